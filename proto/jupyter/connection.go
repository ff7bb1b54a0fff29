package jupyter

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
)

// Connection is a connection file: where a kernel's five sockets are and the key
// of its messages.
type Connection struct {
	Transport string `json:"transport"` // "tcp" or "ipc"
	// IP is the address; of ipc the prefix of the sockets' paths.
	IP              string `json:"ip"`
	ShellPort       int    `json:"shell_port"`
	IOPubPort       int    `json:"iopub_port"`
	StdinPort       int    `json:"stdin_port"`
	ControlPort     int    `json:"control_port"`
	HeartbeatPort   int    `json:"hb_port"`
	SignatureScheme string `json:"signature_scheme"`
	// Key is a secret; it is empty when messages are not signed.
	Key        string `json:"key"`
	KernelName string `json:"kernel_name,omitempty"`
}

// maxConnection bounds a connection file in bytes.
const maxConnection = 64 << 10

// ParseConnection reads and checks a connection file.
func ParseConnection(text []byte) (Connection, error) {
	var c Connection
	if len(text) > maxConnection {
		return c, errors.New("the connection file is over 64 KiB")
	}
	if err := json.Unmarshal(text, &c); err != nil {
		return Connection{}, errors.New("the connection file is not the JSON that Jupyter describes")
	}
	if c.Transport == "" {
		c.Transport = "tcp"
	}
	if c.SignatureScheme == "" {
		c.SignatureScheme = Scheme
	}
	switch {
	case c.Transport != "tcp" && c.Transport != "ipc":
		return Connection{}, fmt.Errorf("the connection file's transport %.20q is neither tcp nor ipc", c.Transport)
	case c.IP == "":
		return Connection{}, errors.New("the connection file has no ip")
	}
	for _, p := range []int{c.ShellPort, c.IOPubPort, c.StdinPort, c.ControlPort, c.HeartbeatPort} {
		if p < 1 || p > 65535 {
			return Connection{}, fmt.Errorf("the connection file's port %d is none", p)
		}
	}
	if _, err := NewSigner(c.SignatureScheme, c.Key); err != nil {
		return Connection{}, err
	}
	return c, nil
}

// Encode is the connection file's text.
func (c Connection) Encode() ([]byte, error) { return json.MarshalIndent(c, "", "  ") }

// Endpoint is the ZeroMQ endpoint of a port: tcp://IP:PORT, or ipc://IP-PORT.
func (c Connection) Endpoint(port int) string {
	if c.Transport == "ipc" {
		return "ipc://" + c.Path(port)
	}
	return "tcp://" + net.JoinHostPort(c.IP, strconv.Itoa(port))
}

// Path is the path of a port's socket, of transport ipc.
func (c Connection) Path(port int) string { return c.IP + "-" + strconv.Itoa(port) }
