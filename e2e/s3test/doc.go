// Package s3test runs a real S3 server for tests: versitygw, which keeps objects as files of
// a directory. `make s3-test` builds it from the module e2e/s3server.
package s3test
