package syslog

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/proto/auditchain"
)

// A rsyslog is a real rsyslogd: what it took is in a file, field by field.
type rsyslog struct {
	t       *testing.T
	dir     string
	port    int
	network string
	cmd     *exec.Cmd
	said    said
}

const rsyslogd = "/usr/sbin/rsyslogd"

func newRsyslog(t *testing.T, network string) *rsyslog {
	t.Helper()
	if _, err := os.Stat(rsyslogd); err != nil {
		t.Fatalf("rsyslogd is missing: run packaging/dev/deps.sh rsyslog (%v)", err)
	}
	dir, err := os.MkdirTemp("/tmp", "syslog") // a socket's path may not be long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) }) //nolint:errcheck // a throwaway
	s := &rsyslog{t: t, dir: dir, network: network, port: freePort(t, network)}
	input := map[string]string{
		"unixgram": `module(load="imuxsock" SysSock.Use="off") input(type="imuxsock" Socket="DIR/log" UseSpecialParser="off" ParseHostname="on" UseSysTimeStamp="off" IgnoreTimestamp="off" RateLimit.Interval="0")`,
		"udp":      `module(load="imudp") input(type="imudp" address="127.0.0.1" port="PORT" rcvbufsize="4m")`,
		"tcp":      `module(load="imtcp") input(type="imtcp" address="127.0.0.1" port="PORT")`,
		"tls": `global(DefaultNetstreamDriver="gtls" DefaultNetstreamDriverCAFile="DIR/ca.pem" DefaultNetstreamDriverCertFile="DIR/cert.pem" DefaultNetstreamDriverKeyFile="DIR/key.pem")
module(load="imtcp" StreamDriver.Name="gtls" StreamDriver.Mode="1" StreamDriver.AuthMode="x509/certvalid") input(type="imtcp" address="127.0.0.1" port="PORT")`,
	}[network]
	conf := `global(workDirectory="DIR" maxMessageSize="64k" parser.permitSlashInProgramName="on" parser.escapeControlCharactersOnReceive="off")
` + input + `
template(name="fields" type="string" string="<%pri%>1 %timereported:::date-rfc3339% %hostname% %app-name% %procid% %msgid% %structured-data% %msg:::drop-last-lf%\n")
main_queue(queue.type="direct")
action(type="omfile" file="DIR/out" template="fields")
`
	conf = strings.NewReplacer("DIR", dir, "PORT", fmt.Sprint(s.port)).Replace(conf)
	if err := os.WriteFile(s.path("conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	if network == "tls" {
		s.certificates()
	}
	t.Cleanup(s.stop)
	return s
}

func freePort(t *testing.T, network string) int {
	t.Helper()
	find := freeport.TCP
	if network == "udp" {
		find = freeport.UDP
	}
	port, err := find()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// said is what a process says, to be looked at while it runs.
type said struct {
	mu   sync.Mutex
	text []byte
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = append(s.text, b...)
	return len(b), nil
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.text)
}

func (s *rsyslog) path(name string) string { return filepath.Join(s.dir, name) }

func (s *rsyslog) target() Target {
	if s.network == "unixgram" {
		return Target{"unixgram", s.path("log")}
	}
	return Target{s.network, fmt.Sprintf("127.0.0.1:%d", s.port)}
}

// start starts it; it may take a moment until it listens.
func (s *rsyslog) start() {
	s.t.Helper()
	s.cmd = exec.Command(rsyslogd, "-n", "-f", s.path("conf"), "-i", s.path("pid"))
	s.cmd.Stdout, s.cmd.Stderr = &s.said, &s.said
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	if s.network == "udp" { // nobody else says when it does
		until(s.t, "rsyslogd's socket", func() error {
			raw, err := os.ReadFile("/proc/net/udp")
			if err != nil || !strings.Contains(string(raw), fmt.Sprintf(":%04X ", s.port)) {
				return fmt.Errorf("port %d is not there, %v: %s", s.port, err, s.said.String())
			}
			return nil
		})
	}
}

func (s *rsyslog) stop() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it may have ended
	kill := time.AfterFunc(10*time.Second, func() { _ = s.cmd.Process.Kill() })
	s.cmd.Wait() //nolint:errcheck // likewise
	kill.Stop()
	s.cmd = nil
	os.Remove(s.path("pid")) //nolint:errcheck // it does that itself
}

// whole waits until every entry of the chain is in the file, and checks each.
func (s *rsyslog) whole(m *memoryChain) {
	s.t.Helper()
	until(s.t, "all entries in rsyslogd's file", func() error {
		raw, err := os.ReadFile(s.path("out"))
		if err != nil {
			return fmt.Errorf("%w: %s", err, s.said.String())
		}
		got := map[string]string{}
		for line := range strings.Lines(string(raw)) {
			f := form.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
			if f == nil {
				return fmt.Errorf("a line that is none of the template: %.300s", line)
			}
			if f[1] != "85" || f[3] != "db-host" || f[4] != "postern-agentd" || f[5] != "4711" || f[6] != "sql.run" {
				return fmt.Errorf("other fields: %.300s", line)
			}
			got[f[7]] = f[8]
		}
		v := auditchain.NewVerifier(auditchain.Head{})
		m.mu.Lock()
		defer m.mu.Unlock()
		for i := range m.lines {
			if err := v.Add([]byte(got[fmt.Sprint(i+1)])); err != nil {
				return fmt.Errorf("entry %d of %d is %.200q: %w", i+1, len(m.lines), got[fmt.Sprint(i+1)], err)
			}
		}
		return nil
	})
}

// certificates makes a CA, a server's certificate and a client's.
func (s *rsyslog) certificates() {
	s.t.Helper()
	must := func(err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	now := time.Now()
	make := func(number int64, name string, ca bool, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		cert := &x509.Certificate{
			SerialNumber: big.NewInt(number), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: ca, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if ca {
			cert.KeyUsage, cert.ExtKeyUsage = x509.KeyUsageCertSign, nil
			parent, by = cert, key
		} else {
			cert.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		}
		der, err := x509.CreateCertificate(rand.Reader, cert, parent, &key.PublicKey, by)
		must(err)
		cert, err = x509.ParseCertificate(der)
		must(err)
		raw, err := x509.MarshalPKCS8PrivateKey(key)
		must(err)
		must(os.WriteFile(s.path(name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
		must(os.WriteFile(s.path(name+"-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600))
		return cert, key
	}
	ca, caKey := make(1, "ca", true, nil, nil)
	make(2, "cert", false, ca, caKey)
	make(3, "client", false, ca, caKey)
	must(os.Rename(s.path("cert-key.pem"), s.path("key.pem")))
}

func (s *rsyslog) tls(client bool) func() (*tls.Config, error) {
	files := Files{CA: s.path("ca.pem")}
	if client {
		files.Cert, files.Key = s.path("client.pem"), s.path("client-key.pem")
	}
	return files.Config
}

// TestRsyslog: a real rsyslogd takes the entries as RFC 5424 messages by each of its ways, and, but for
// UDP, none is lost while it is away.
func TestRsyslog(t *testing.T) {
	for _, network := range []string{"unixgram", "udp", "tcp", "tls"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			s := newRsyslog(t, network)
			s.start()
			m := &memoryChain{}
			m.add(someEntries(700)...)
			f, _ := forward(t, s.target(), 200*time.Millisecond, map[string]Chain{"": m}, func(c *Config) { c.TLS = s.tls(true) })
			s.whole(m)
			delivered(t, m)
			if network == "udp" {
				return
			}
			s.stop()
			m.add(someEntries(50)...)
			until(t, "a failure", func() error {
				if st := f.Stats(); st.Connected || st.Oldest.IsZero() {
					return fmt.Errorf("%+v", st)
				}
				return nil
			})
			s.start()
			s.whole(m)
			delivered(t, m)
		})
	}
}

// TestTLSRefuses: a server whose certificate is of another authority, or another's name, and one that wants a
// certificate of ours, get nothing.
func TestTLSRefuses(t *testing.T) {
	s := newRsyslog(t, "tls")
	s.start()
	until(t, "rsyslogd", func() error {
		c, err := net.Dial("tcp", s.target().Address)
		if err == nil {
			err = c.Close()
		}
		return err
	})
	other := newRsyslog(t, "tls") // only its authority
	for name, c := range map[string]struct {
		target Target
		tls    func() (*tls.Config, error)
		want   string
	}{
		"another authority": {s.target(), other.tls(true), "certificate signed by unknown authority"},
		"another name":      {Target{"tls", fmt.Sprintf("localhost:%d", s.port)}, s.tls(true), "wanted to match localhost"},
		"no file":           {s.target(), Files{CA: s.path("no.pem")}.Config, "no.pem: no such file"},
		"no certificates":   {s.target(), Files{CA: s.path("key.pem")}.Config, "holds no certificate"},
		"no key":            {s.target(), Files{CA: s.path("ca.pem"), Cert: s.path("client.pem"), Key: s.path("ca.pem")}.Config, "client.pem"},
	} {
		m := &memoryChain{}
		m.add(entry(1))
		f, stop := forward(t, c.target, time.Millisecond, map[string]Chain{"": m}, func(cfg *Config) { cfg.TLS = c.tls })
		until(t, name, func() error {
			if st := f.Stats(); st.Connected || !strings.Contains(st.Err, c.want) || strings.Contains(st.Err, "\n") {
				return fmt.Errorf("%+v, want %q", st, c.want)
			}
			return nil
		})
		stop()
		if f.Stats().Sent != 0 || m.at.Sequence != 0 {
			t.Errorf("%s: %d were sent", name, f.Stats().Sent)
		}
	}
}
