package netlab

import "fmt"

// ruleset is the firewall: established connections pass, new ones only as
// Options.Egress says. The chain cut is empty until Cut fills it.
func ruleset(o Options) string {
	var forward, input string
	switch o.Egress {
	case Direct:
		forward = `iifname "customer" oifname "cloud" ct state new accept`
	case Proxy:
		input = `iifname "customer" tcp dport 3128 ct state new accept`
	}
	return fmt.Sprintf(`table inet lab {
	chain cut {
	}
	chain input {
		type filter hook input priority 0; policy drop;
		jump cut
		iifname "lo" accept
		ct state established,related accept
		%s
	}
	chain forward {
		type filter hook forward priority 0; policy drop;
		jump cut
		ct state established,related accept
		%s
	}
	chain output {
		type filter hook output priority 0; policy accept;
		jump cut
	}
}
`, input, forward)
}

// Cut makes the firewall drop every packet from now on, of connections under way
// too. Nobody is told: no reset, no ICMP.
func (l *Lab) Cut() error {
	return l.nft(`add rule inet lab cut iifname != "lo" drop
add rule inet lab cut oifname != "lo" drop
`)
}

// Heal ends what Cut did. It may be called without Cut.
func (l *Lab) Heal() error { return l.nft("flush chain inet lab cut\n") }

func (l *Lab) nft(script string) error {
	return run(script, "ip", "netns", "exec", l.Firewall, find("nft"), "-f", "-")
}
