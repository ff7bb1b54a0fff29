// Package ratelimit bounds how often something may happen for each key, such as
// failed log-ins for each address. Memory is bounded whatever the keys: a Limiter
// holds a fixed number of buckets. Other packages declare the methods that they
// need as interfaces of their own.
package ratelimit
