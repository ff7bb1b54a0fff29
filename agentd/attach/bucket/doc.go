// Package bucket reads and writes the objects of a bucket that speaks S3, for mounts of it.
//
// agentd has the Store: it holds the credentials, speaks with the object store, and decides
// with each request what is allowed. mountd has the Client, which has neither credentials
// nor a network: it asks agentd by the unix socket that it also has its tunnel from
// (Handler). A mount that asks for a bucket while agentd is restarted waits for it.
//
// Words: a key is an object's name; a directory is a prefix of keys that ends in a slash, "" is
// the root; a name is what stands between two slashes. Keys of which a name cannot be a
// file's are hidden and counted: "", ".", "..", more than 255 bytes, control characters, invalid
// UTF-8, and __0x..__, which the library takes for an escape.
//
// All methods may be called concurrently. Whatever goes to the object store is tried again
// until it works, the context ends, or the object store says that it never will.
package bucket
