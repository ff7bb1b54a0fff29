package journal

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// scan reads a segment, tells whether its dump is whole and where its good entries end,
// and calls replay with them. It holds one entry in memory.
func scan(name string, segment uint64, replay func([]byte, Place) error) (whole bool, end int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return false, 0, err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	var payload []byte
	for {
		kind, _, p, err := readEntry(r, payload)
		if errors.Is(err, errEntry) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return whole, end, err
		}
		payload = p
		at := Place{segment, end + headerSize, len(payload)}
		end += headerSize + int64(len(payload))
		if kind == kindDumpEnd {
			whole = true
			continue
		}
		if replay != nil {
			if err := replay(payload, at); err != nil {
				return whole, end, err
			}
		}
	}
	if replay == nil && whole {
		if err := searchSynced(f, end); err != nil {
			return whole, end, err
		}
	}
	return whole, end, nil
}

var errEntry = errors.New("no entry")

// readEntry reads one entry into buf, which it grows if needed.
func readEntry(r io.Reader, buf []byte) (kind byte, synced int64, payload []byte, err error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, buf, err
	}
	n := int(binary.LittleEndian.Uint32(head[4:]))
	if string(head[:4]) != magic || n > MaxEntry || head[16] < kindEntry || head[16] > kindDumpEnd {
		return 0, 0, buf, errEntry
	}
	if cap(buf) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		return 0, 0, buf, err
	}
	if crc32.Update(crc32.Checksum(head[4:17], castagnoli), castagnoli, buf) != binary.LittleEndian.Uint32(head[17:]) {
		return 0, 0, buf, errEntry
	}
	return head[16], int64(binary.LittleEndian.Uint64(head[8:])), buf, nil
}

// searchSynced looks behind the first bad entry for a good one that was written when
// that place had been synced.
func searchSynced(f *os.File, from int64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	const window = 1 << 20
	buf := make([]byte, window+3)
	for at := from + 1; at < info.Size(); at += window {
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for i := 0; i+4 <= n; i++ {
			if buf[i] != magic[0] || string(buf[i:i+4]) != magic {
				continue
			}
			_, synced, _, err := readEntry(io.NewSectionReader(f, at+int64(i), headerSize+MaxEntry), nil)
			if err == nil && synced > from {
				return fmt.Errorf("%w: the entry at byte %d, which had been synced; restore the file from a copy, or move the directory away and lose what was not uploaded", ErrCorrupt, from)
			}
		}
	}
	return nil
}
