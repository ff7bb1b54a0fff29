package fuseserver

import (
	"encoding/binary"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// What is needed of the kernel's protocol beside go-fuse: include/uapi/linux/fuse.h,
// 7.45. Everything is in the machine's byte order.
const (
	inHeaderSize  = 40 // length u32, opcode u32, unique u64, nodeid u64, uid, gid, pid u32, extlen u16, padding
	outHeaderSize = 16 // length u32, error i32, unique u64

	opForget      = 2
	opRead        = 15
	opFsync       = 20
	opGetXattr    = 22
	opListXattr   = 23
	opFlush       = 25
	opInit        = 26
	opReadDir     = 28
	opSetLkW      = 33
	opInterrupt   = 36
	opDestroy     = 38
	opIoctl       = 39
	opBatchForget = 42
	opReadDirPlus = 44

	notifyInvalInode = 2 // ino u64, offset i64, length i64
	notifyInvalEntry = 3 // parent u64, namelen u32, flags u32, name, NUL
	notifyDelete     = 6 // parent u64, child u64, namelen u32, padding, name, NUL
	notifyResend     = 7 // nothing

	// ResentBit is set in the unique of a request that the kernel sends again.
	ResentBit = uint64(1) << 63

	backingOpen  = 0x4010e501 // _IOW(229, 1, struct fuse_backing_map)
	backingClose = 0x4004e502 // _IOW(229, 2, uint32_t)
)

var native = binary.NativeEndian

func opcode(request []byte) uint32 { return native.Uint32(request[4:]) }
func unique(request []byte) uint64 { return native.Uint64(request[8:]) }

// replySize is how many bytes the reply to a request may have: READ and its like say so.
// A reply without a bulk has at most a symlink's target, or an xattr's value that was
// not asked for.
func replySize(request []byte) int {
	const small = 8 << 10
	at := 0
	switch opcode(request) {
	case opRead, opReadDir, opReadDirPlus:
		at = inHeaderSize + 16
	case opGetXattr, opListXattr:
		at = inHeaderSize
	case opIoctl:
		at = inHeaderSize + 28
	}
	if at == 0 || len(request) < at+4 {
		return small
	}
	return small + int(native.Uint32(request[at:]))
}

// notification is a message to the kernel that answers no request.
func notification(code int32, fields ...uint64) []byte {
	out := make([]byte, outHeaderSize, outHeaderSize+8*len(fields))
	native.PutUint32(out[4:], uint32(code))
	for _, f := range fields {
		out = native.AppendUint64(out, f)
	}
	native.PutUint32(out, uint32(len(out)))
	return out
}

// named adds a name's length, a flag word and the name to a notification.
func named(out []byte, name string) []byte {
	out = native.AppendUint32(out, uint32(len(name)))
	out = native.AppendUint32(out, 0)
	out = append(append(out, name...), 0)
	native.PutUint32(out, uint32(len(out)))
	return out
}

// refusal is the answer to a request that is an error.
func refusal(id uint64, errno fuse.Status) []byte {
	out := make([]byte, outHeaderSize)
	native.PutUint32(out, outHeaderSize)
	native.PutUint32(out[4:], uint32(-int32(errno)))
	native.PutUint64(out[8:], id)
	return out
}

// interruption is the request that cancels another one inside go-fuse.
func interruption(id uint64) []byte {
	out := make([]byte, int(unsafe.Sizeof(fuse.InterruptIn{})))
	native.PutUint32(out, uint32(len(out)))
	native.PutUint32(out[4:], opInterrupt)
	native.PutUint64(out[inHeaderSize:], id)
	return out
}
