package registrar

import "github.com/redis/go-redis/v9"

// unanswered returns the error of a pipeline, as Exec and Pipelined return it with
// their commands, if it is the whole pipeline's: there was no connection, or its
// log-in was refused. go-redis leaves the commands without an error then, and their
// empty values would read as Redis' answers. Else each command has its own.
func unanswered(cmds []redis.Cmder, err error) error {
	for _, cmd := range cmds {
		if cmd.Err() != nil {
			return nil
		}
	}
	return err
}
