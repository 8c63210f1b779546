package registrar

import (
	"context"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// TestNoAnswerIsNotEmpty has Redis refuse the log-in, or the choice of a database, to
// everybody who reads: each says so, and takes nothing for an answer. One pipeline
// without an answer has read as a registry without a TTL, reapers and balancers.
func TestNoAnswerIsNotEmpty(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	nodes := redistest.StartCluster(t, 3)
	for _, s := range append(redistest.Cluster{srv}, nodes...) {
		rdb := s.Client(t)
		must(t, rdb.Do(t.Context(), "ACL", "SETUSER", "default", "resetpass", ">secret").Err())
		must(t, rdb.Do(t.Context(), "ACL", "SETUSER", "narrow", "on", ">secret", "allkeys", "allchannels", "+@all", "-select").Err())
	}
	a := host(1)
	ids := []string{"lb"}
	for url, want := range map[string]string{
		strings.Replace(srv.URL(), "://", "://default:wrong@", 1): "WRONGPASS",
		srv.URL(): "", // in Redis' many words
		strings.Replace(srv.URL(), "://", "://narrow:secret@", 1)[:len("redis://narrow:secret@")+len(srv.Addr)] + "/1": "NOPERM",
		strings.Replace(nodes.URL(), "://", "://default:wrong@", 1):                                                    "WRONGPASS",
	} {
		rdb, err := Open(url, 2)
		must(t, err)
		t.Cleanup(func() { must(t, rdb.Close()) })
		all, err := NewStore(rdb, DefaultNamespace)
		must(t, err)
		s := all.Of(web)
		for name, read := range map[string]func(context.Context) (any, error){
			"Overview":    func(ctx context.Context) (any, error) { return s.Overview(ctx) },
			"Held":        func(ctx context.Context) (any, error) { return all.Held(ctx, []Place{{web, a}}) },
			"Sights":      func(ctx context.Context) (any, error) { return all.Sights(ctx, web, ids) },
			"Sights of":   func(ctx context.Context) (any, error) { return all.Sights(ctx, web, ids, a) },
			"Rights":      func(ctx context.Context) (any, error) { return all.Rights(ctx, web) },
			"Inventory":   func(ctx context.Context) (any, error) { return all.Inventory(ctx) },
			"listed":      func(ctx context.Context) (any, error) { l, h, err := all.listed(ctx, web); return []bool{l, h}, err },
			"Events":      func(ctx context.Context) (any, error) { return all.Events(ctx, []Service{web}, "", 10) },
			"EventReader": func(ctx context.Context) (any, error) { return all.EventReader([]Service{web}).Next(ctx) },
			"Acks":        func(ctx context.Context) (any, error) { return all.Acks(ctx, web) },
			"Read":        func(ctx context.Context) (any, error) { return all.Read(ctx, web, nil) },
			"Versions":    func(ctx context.Context) (any, error) { return all.Versions(ctx, []Service{web}) },
			"Registry":    func(ctx context.Context) (any, error) { return s.Registry(ctx) },
			"Entry":       func(ctx context.Context) (any, error) { return all.Entry(ctx, web, a) },
			"Ledger":      func(ctx context.Context) (any, error) { return all.Ledger(ctx, "mark") },
			"Services": func(ctx context.Context) (any, error) {
				svcs, _, err := all.Services(ctx)
				return svcs, err
			},
			"LastPulse": func(ctx context.Context) (any, error) { return s.LastPulse(ctx, "r", DefaultTTL) },
		} {
			ctx, cancel := WithTimeout(t.Context())
			got, err := read(ctx)
			cancel()
			if err == nil || !strings.Contains(err.Error(), want) && name != "Rights" {
				t.Errorf("%s, %s: %v, %v; want %s", url, name, got, err, want)
			}
		}
	}
}

// TestUnanswered tells a pipeline's error from its commands'.
func TestUnanswered(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	rdb := srv.Client(t)
	ctx := t.Context()
	must(t, rdb.Set(ctx, "x", "text", 0).Err())
	var list *redis.IntCmd
	cmds, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.Get(ctx, "x")
		list = p.LLen(ctx, "x")
		return nil
	})
	if err == nil || unanswered(cmds, err) != nil || list.Err() == nil {
		t.Errorf("one command failed: %v, %v", err, unanswered(cmds, err))
	}
	if cmds, err = rdb.Pipelined(ctx, func(p redis.Pipeliner) error { p.Get(ctx, "x"); return nil }); unanswered(cmds, err) != nil {
		t.Error(err)
	}
	must(t, rdb.Do(ctx, "ACL", "SETUSER", "default", "resetpass", ">secret").Err())
	refused, err := Open(strings.Replace(srv.URL(), "://", "://default:wrong@", 1), 1)
	must(t, err)
	defer refused.Close()
	if cmds, err = refused.Pipelined(ctx, func(p redis.Pipeliner) error { p.Get(ctx, "x"); return nil }); err == nil || unanswered(cmds, err) == nil && cmds[0].Err() == nil {
		t.Errorf("the log-in was refused, and nothing says so: %v, %v", err, cmds)
	}
}

// TestPipelineErrorsAreLookedAt reads the source: nobody may drop what Exec or
// Pipelined returns, since commands without an answer have no error of their own.
func TestPipelineErrorsAreLookedAt(t *testing.T) {
	t.Parallel()
	found := 0
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		set := gotoken.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		n, dropped := droppedPipelines(file)
		found += n
		for _, at := range dropped {
			t.Errorf("%s: the error of a pipeline is dropped", set.Position(at))
		}
		return nil
	})
	must(t, err)
	if found < 8 {
		t.Errorf("found %d pipelines", found)
	}
	for text, want := range map[string]int{
		"pipe.Exec(ctx)": 1, "_, _ = pipe.Exec(ctx)": 1, "cmds, _ := pipe.Exec(ctx)": 1, "go pipe.Exec(ctx)": 1, "defer rdb.TxPipelined(ctx, f)": 1,
		"_, err := rdb.Pipelined(ctx, f)": 0, "if err := unanswered(pipe.Exec(ctx)); err != nil {}": 0, "_ = unanswered(pipe.Exec(ctx))": 1,
		"db.Query(ctx)": 0,
	} {
		file, err := parser.ParseFile(gotoken.NewFileSet(), "x.go", "package x\nfunc f() { "+text+" }", 0)
		must(t, err)
		if _, dropped := droppedPipelines(file); len(dropped) != want {
			t.Errorf("%s: %d dropped, want %d", text, len(dropped), want)
		}
	}
}

// droppedPipelines counts the calls of a file that send pipelines, and returns where
// their last result is dropped.
func droppedPipelines(file *ast.File) (found int, dropped []gotoken.Pos) {
	sends := func(e ast.Expr) bool {
		call, ok := e.(*ast.CallExpr)
		if !ok {
			return false
		}
		name := ""
		switch f := call.Fun.(type) {
		case *ast.SelectorExpr:
			name = f.Sel.Name
		case *ast.Ident:
			name = f.Name
		}
		return name == "Exec" || name == "Pipelined" || name == "TxPipelined" || name == "unanswered"
	}
	drop := func(e ast.Expr) {
		if sends(e) {
			dropped = append(dropped, e.Pos())
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			if sends(n) {
				found++
			}
		case *ast.ExprStmt:
			drop(n.X)
		case *ast.GoStmt:
			drop(n.Call)
		case *ast.DeferStmt:
			drop(n.Call)
		case *ast.AssignStmt:
			if last, ok := n.Lhs[len(n.Lhs)-1].(*ast.Ident); ok && last.Name == "_" && len(n.Rhs) == 1 {
				drop(n.Rhs[0])
			}
		}
		return true
	})
	return found, dropped
}
