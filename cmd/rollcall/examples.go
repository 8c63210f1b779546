package main

// examples are what a person would type first, by command. A test parses each.
var examples = map[string][]string{
	"register": {
		"rollcall register --service web --addr 10.0.0.7:8080 --check http://127.0.0.1:8080/healthz",
		"rollcall register --service web --addr :8080 -- ./app --port 8080",
	},
	"docker":     {"rollcall docker --explicit"},
	"deregister": {"rollcall deregister --service web --addr 10.0.0.7:8080"},
	"reap":       {"rollcall reap", "rollcall reap --ttl 15s --heartbeat 5s --http 127.0.0.1:9465"},
	"lbsync": {
		"rollcall lbsync --socket /run/haproxy/admin.sock --backend web=be_web",
		"rollcall lbsync --socket /run/haproxy/admin.sock --backend web=be_web --dry-run",
	},
	"services":  {"rollcall services"},
	"instances": {"rollcall instances web", "rollcall instances web -o json"},
	"overrides": {"rollcall overrides", "rollcall overrides web -o json"},
	"watch":     {"rollcall watch", "rollcall watch web"},
	"lb":        {"rollcall lb web"},
	"wait":      {"rollcall wait web --for ready=3", "rollcall wait web --for converged --timeout 5s"},
	"status":    {"rollcall status"},
	"explain":   {"rollcall explain web 10.0.0.7:8080"},
	"events":    {"rollcall events web"},
	"doctor":    {"rollcall doctor", "rollcall doctor --socket /run/haproxy/admin.sock --backend web=be_web"},
	"serve":     {"rollcall serve", "rollcall serve --listen 127.0.0.1:8300 --token-file /etc/rollcall/token"},
	"drain": {
		`rollcall drain web 10.0.0.7:8080 --reason "new disk" --for 2h --wait`,
		`rollcall drain --host 10.0.0.7 --reason "new kernel" --wait`,
		"rollcall drain web --zone a --tag commit=4f1c --dry-run",
	},
	"maint":  {`rollcall maint web 10.0.0.7:8080 --reason "broken"`, "rollcall maint --host 10.0.0.7"},
	"ready":  {"rollcall ready web 10.0.0.7:8080", "rollcall ready --host 10.0.0.7 --wait"},
	"weight": {"rollcall weight web 10.0.0.7:8080 50", "rollcall weight web 10.0.0.7:8080 own", "rollcall weight web --tag commit=4f1c --to 20"},
	"demo":   {"rollcall demo"},
}
