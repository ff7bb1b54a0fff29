// Package simulateds3 answers as an S3 object store does, as far as the control plane and
// agentd ask: objects of one part in one bucket, in memory. It is a simulation for tests:
// `make s3-test` runs the same tests against a real S3 server. It knows users by their access
// key and does not verify signatures.
package simulateds3
