package sqlsession

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Metrics are the package's own; see docs/sql.md for the list.
type Metrics struct {
	sessions   prometheus.Gauge
	running    prometheus.Gauge
	starts     *prometheus.HistogramVec
	statements *prometheus.CounterVec
	seconds    prometheus.Histogram
	rows       prometheus.Counter
	bytes      prometheus.Counter

	parses       *prometheus.CounterVec
	parseSeconds *prometheus.CounterVec
	parserStarts *prometheus.CounterVec
	open         prometheus.Gauge
	ended        *prometheus.CounterVec

	wires          prometheus.Gauge
	wireStatements *prometheus.CounterVec
	wireRows       prometheus.Counter
	wireBytes      prometheus.Counter
}

// NewMetrics makes the metrics and registers them; r may be nil.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "agentd_sql_sessions", Help: "SQL session processes, warm, idle or busy.",
		}),
		running: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "agentd_sql_statements_running", Help: "Statements under way, waiting ones included.",
		}),
		starts: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "agentd_sql_session_start_seconds", Help: "Time from the start of a process to its connection to the database.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 12),
		}, []string{"result"}),
		statements: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "agentd_sql_statements_total", Help: "Statements by how they ended: ok or an error code.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "agentd_sql_statement_seconds", Help: "Time from a statement's arrival to its end.",
			Buckets: prometheus.ExponentialBuckets(0.002, 4, 10),
		}),
		rows:  prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_sql_rows_total", Help: "Rows delivered."}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_sql_result_bytes_total", Help: "Arrow IPC bytes delivered."}),

		parses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "agentd_sql_parses_total", Help: "Statements that a parser process has parsed; others were known to the session already.",
		}, []string{"lane"}),
		parseSeconds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "agentd_sql_parse_seconds_total", Help: "Time that the parser processes took for statements.",
		}, []string{"lane"}),
		parserStarts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "agentd_sql_parser_starts_total", Help: "Starts of parser processes: more than the first mean that one died.",
		}, []string{"lane"}),
	}
	m.open = prometheus.NewGauge(prometheus.GaugeOpts{Name: "agentd_sql_open_sessions", Help: "Sessions that stay open for their owners."})
	m.ended = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "agentd_sql_open_sessions_ended_total", Help: "Sessions that stayed open, by why they ended: closed, idle, policy or lost.",
	}, []string{"reason"})
	m.wires = prometheus.NewGauge(prometheus.GaugeOpts{Name: "agentd_wire_sessions", Help: "Sessions of PostgreSQL's own protocol."})
	m.wireStatements = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "agentd_wire_statements_total", Help: "Statements of PostgreSQL's own protocol by how they ended: ok or an error code.",
	}, []string{"result"})
	m.wireRows = prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_wire_rows_total", Help: "Rows delivered in PostgreSQL's own protocol."})
	m.wireBytes = prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_wire_bytes_total", Help: "Bytes of protocol that these rows took."})
	if r != nil {
		r.MustRegister(m.wires, m.wireStatements, m.wireRows, m.wireBytes)
		r.MustRegister(m.parses, m.parseSeconds, m.parserStarts, m.sessions, m.running, m.starts, m.statements, m.seconds, m.rows, m.bytes, m.open, m.ended)
	}
	return m
}

func (m *Metrics) started(since time.Time, err error) {
	m.starts.WithLabelValues(resultOf(err)).Observe(time.Since(since).Seconds())
}

// resultOf is a label from a closed set: ok, or an error code's name.
func resultOf(err error) string {
	if err == nil {
		return "ok"
	}
	return proto.CodeOf(err).String()
}

// wireEnded counts a statement of PostgreSQL's own protocol.
func (m *Metrics) wireEnded(e *posternv1.WireEvent) {
	result := "ok"
	if e.Error != nil {
		result = e.Error.Code.String()
	}
	m.wireStatements.WithLabelValues(result).Inc()
	m.wireRows.Add(float64(e.Rows))
	m.wireBytes.Add(float64(e.Bytes))
}
