package s3test

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"
)

// Faults is a proxy in front of an object store that lets one request in a number fail, in
// turns: refused with 503 SlowDown, cut off before the store has seen it, cut off after the
// store has done it, and cut off in the midst of the answer. It ends with its test.
type Faults struct {
	// URL is its endpoint.
	URL string

	every, requests, failed atomic.Int64
}

// NewFaults starts a proxy in front of an endpoint; every is 0 for none that fails.
func NewFaults(t testing.TB, endpoint string, every int64) *Faults {
	t.Helper()
	to, err := url.Parse(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	f := &Faults{}
	f.every.Store(every)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{
		// The host stays as it was: it is signed.
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(to); r.Out.Host = r.In.Host },
		Transport:    transport,
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, every := f.requests.Add(1), f.every.Load()
		if every == 0 || n%every != 0 {
			proxy.ServeHTTP(w, r)
			return
		}
		switch kind := f.failed.Add(1) % 4; kind {
		case 0:
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusServiceUnavailable)
			w.Write([]byte("<Error><Code>SlowDown</Code><Message>a fault of the test</Message></Error>")) //nolint:errcheck // the caller sees it
		case 1:
			panic(http.ErrAbortHandler)
		default:
			answer := httptest.NewRecorder()
			proxy.ServeHTTP(answer, r)
			if body := answer.Body.Bytes(); kind == 3 && len(body) > 1 {
				for name, values := range answer.Header() {
					w.Header()[name] = values
				}
				w.WriteHeader(answer.Code)
				w.Write(body[:len(body)/2]) //nolint:errcheck // it is cut off anyway
			}
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(server.Close)
	f.URL = server.URL
	return f
}

// Every sets how many requests there are for one that fails; 0: none fails.
func (f *Faults) Every(n int64) { f.every.Store(n) }

// Counts are how many requests came, and how many of them failed.
func (f *Faults) Counts() (requests, failed int64) { return f.requests.Load(), f.failed.Load() }
