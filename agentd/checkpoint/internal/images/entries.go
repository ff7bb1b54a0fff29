package images

import (
	"encoding/binary"
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"
)

const (
	magicLen = 8
	// maxImage bounds an image file that is read into memory, in bytes: files.img of a
	// kernel with 65536 open files has 20 MB.
	maxImage = 256 << 20
)

// each reads an image file, calls do with each entry decoded into fresh(), and returns
// the file with what do changed. only bounds how many entries there are; what follows
// them is kept as it is.
func each(path string, fresh func() proto.Message, only int, do func(proto.Message) (changed bool)) (out []byte, changed bool, err error) {
	return eachWith(path, fresh, only, func(proto.Message, []byte) int { return 0 }, do)
}

// eachWith is each for images in which tail(entry, rest) bytes, of which rest begins, follow
// each entry; a negative one: rest can't be understood.
func eachWith(path string, fresh func() proto.Message, only int, tail func(proto.Message, []byte) int, do func(proto.Message) (changed bool)) (out []byte, changed bool, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, false, err
	}
	if info.Size() > maxImage {
		return nil, false, fmt.Errorf("image %s has %d bytes", path, info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, false, err
	}
	if len(b) < magicLen {
		return nil, false, fmt.Errorf("image %s is cut", path)
	}
	out = append(out, b[:magicLen]...)
	b = b[magicLen:]
	for n := 0; len(b) > 0 && (only == 0 || n < only); n++ {
		if len(b) < 4 || uint64(binary.LittleEndian.Uint32(b)) > uint64(len(b)-4) {
			return nil, false, fmt.Errorf("image %s is cut", path)
		}
		size := int(binary.LittleEndian.Uint32(b))
		raw := b[4 : 4+size]
		b = b[4+size:]
		m := fresh()
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(raw, m); err != nil {
			return nil, false, fmt.Errorf("image %s: %w", path, err)
		}
		if do(m) {
			changed = true
			if raw, err = (proto.MarshalOptions{AllowPartial: true}).Marshal(m); err != nil {
				return nil, false, fmt.Errorf("image %s: %w", path, err)
			}
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(len(raw)))
		out = append(out, raw...)
		n := tail(m, b)
		if n < 0 || n > len(b) {
			return nil, false, fmt.Errorf("image %s is cut", path)
		}
		out, b = append(out, b[:n]...), b[n:]
	}
	return append(out, b...), changed, nil
}
