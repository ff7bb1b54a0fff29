package bucket

import "gocloud.dev/blob/memblob"

// OpenMemoryForTest makes a Store in memory, for tests of what stands on it. It differs from
// S3 in what a listing tells: no ETags.
func OpenMemoryForTest(name string) *Store {
	return newStore(memblob.OpenBucket(nil), Config{Name: name})
}
