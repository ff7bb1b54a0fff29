package control

import "time"

// Status is what agentd says of itself; `agentd status -o json` prints it.
type Status struct {
	Software string    `json:"software"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	// State is running or stopping.
	State    string    `json:"state"`
	Agent    Agent     `json:"agent"`
	Link     Link      `json:"link"`
	Config   File      `json:"config"`
	Sources  []Source  `json:"sources"`
	Queries  []Query   `json:"queries"`
	Sessions []Session `json:"sessions"`
	Kernels  []Kernel  `json:"kernels"`
	// Attachments are mounts of workspaces, with what is not uploaded yet.
	Attachments Attachments `json:"attachments"`
	Audit       Audit       `json:"audit"`
}

// Agent is who the host is.
type Agent struct {
	ID                 string    `json:"id"`
	Name               string    `json:"name"`
	Organization       string    `json:"organization"`
	URL                string    `json:"url"`
	CertificateSerial  string    `json:"certificate_serial"`
	CertificateExpires time.Time `json:"certificate_expires"`
}

// Link is the tunnel to the control plane.
type Link struct {
	Up    bool      `json:"up"`
	Since time.Time `json:"since"`
	URL   string    `json:"url"`
	// Cause and Code say why it is down, Attempts how often it was tried.
	Cause    string `json:"cause,omitempty"`
	Code     string `json:"code,omitempty"`
	Attempts int    `json:"attempts,omitempty"`

	Tunnel           string  `json:"tunnel,omitempty"`
	Remote           string  `json:"remote,omitempty"`
	RoundTripSeconds float64 `json:"round_trip_seconds,omitempty"`
	Streams          int     `json:"streams"`
	PeerSoftware     string  `json:"peer_software,omitempty"`
	// ClockSkewSeconds is this host's clock minus the control plane's.
	ClockSkewSeconds float64 `json:"clock_skew_seconds"`
}

// File is the configuration in force.
type File struct {
	Path   string    `json:"path"`
	Loaded time.Time `json:"loaded"`
	// Error is why the last reload was refused.
	Error string `json:"error,omitempty"`
}

// Source is a data source and its policy.
type Source struct {
	Name                    string  `json:"name"`
	Engine                  string  `json:"engine"`
	Mode                    string  `json:"mode"`
	MaxRows                 uint64  `json:"max_rows"`
	MaxBytes                uint64  `json:"max_bytes"`
	StatementTimeoutSeconds float64 `json:"statement_timeout_seconds"`
	Concurrency             int     `json:"concurrency"`
	Running                 int     `json:"running"`
}

// Query is a statement under way.
type Query struct {
	ID      string    `json:"id"`
	Source  string    `json:"source"`
	Started time.Time `json:"started"`
	Rows    uint64    `json:"rows"`
}

// Session is a SQL session that stays open.
type Session struct {
	ID     string `json:"id"`
	Source string `json:"source"`
	// Token is the name of the API token that opened it.
	Token    string    `json:"token"`
	Opened   time.Time `json:"opened"`
	LastUsed time.Time `json:"last_used"`
	// Transaction is none, open or failed.
	Transaction string `json:"transaction"`
	Statements  uint64 `json:"statements"`
	// Protocol is postgresql for a session of PostgreSQL's own protocol, of which
	// LastUsed and Transaction are not known.
	Protocol string `json:"protocol,omitempty"`
}

// Kernel is a Jupyter kernel.
type Kernel struct {
	ID   string `json:"id"`
	Spec string `json:"spec"`
	// State is starting, idle, busy, changing, suspended or dead; Reason says why.
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
	// Token is the name of the API token that started it.
	Token        string    `json:"token"`
	Started      time.Time `json:"started"`
	LastActivity time.Time `json:"last_activity"`
	// Connections are clients attached.
	Connections int `json:"connections"`
	// Generation counts the starts of its processes.
	Generation uint64 `json:"generation"`
}

// Syslog is how the audit log is forwarded.
type Syslog struct {
	// To is the server's URL; Through the last entry that it has; Error why it cannot be reached, "" if it can.
	To      string `json:"to"`
	Through uint64 `json:"through"`
	Error   string `json:"error,omitempty"`
}

// Audit is the end of the host's log.
type Audit struct {
	// First is the number of the oldest entry that is kept; above 1 where older ones were retired.
	First uint64 `json:"first,omitempty"`
	// Syslog is how forwarding goes; nil: there is none.
	Syslog   *Syslog `json:"syslog,omitempty"`
	Sequence uint64  `json:"sequence"`
	Hash     string  `json:"hash,omitempty"`
	Bytes    int64   `json:"bytes"`
	// Warning tells that the control plane knows another chain.
	Warning string `json:"warning,omitempty"`
}

// Check is one line of doctor.
type Check struct {
	Name string `json:"name"`
	// Result is ok, warning or failed.
	Result  string `json:"result"`
	Message string `json:"message"`
	// Remedy is what to do about it.
	Remedy string `json:"remedy,omitempty"`
}
