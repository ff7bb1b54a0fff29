package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// pieceBytes is the most text of one piece of a stream message, in bytes of JSON.
const pieceBytes = 256 << 10

// splitStream makes messages of a bounded size of one message that prints more than
// zmtp.LargeFrame: ipykernel gathers what is printed for a fifth of a second, which may
// be hundreds of MiB. The content is never in memory as a whole. It wants nothing of
// other messages. The text keeps its JSON escapes; pieces end between characters.
//
// The signature is over the whole content and known to be good only at its end; the
// socket is the kernel's own user's all the same (see reach).
func (l *link) splitStream(before [][]byte, body io.Reader, put func(*posternv1.KernelMessage) error) (bool, error) {
	at := -1
	for i, f := range before {
		if string(f) == "<IDS|MSG>" {
			at = i
			break
		}
	}
	if at < 0 || len(before) != at+5 {
		return false, nil // the frame is not the content
	}
	header, err := jupyter.ParseHeader(before[at+2])
	if err != nil || header.Type != "stream" {
		return false, nil
	}
	n := 0
	err = pieces(body, func(name, text []byte) error {
		h := header
		h.ID = fmt.Sprintf("%s_%d", header.ID, n)
		n++
		top, err := json.Marshal(h)
		if err != nil {
			return err
		}
		content := make([]byte, 0, len(name)+len(text)+32)
		content = append(append(content, `{"name":`...), name...)
		content = append(append(append(content, `,"text":"`...), text...), `"}`...)
		return put(&posternv1.KernelMessage{
			Channel: jupyter.IOPub, Header: top, ParentHeader: bytes.Clone(before[at+3]), Metadata: bytes.Clone(before[at+4]), Content: content,
		})
	})
	if errors.Is(err, errNoStream) {
		l.s.logger.Warn("large message of the kernel left out", "err", err)
		return true, put(nil)
	}
	return true, err
}

// errNoStream is returned for a content that is not that of a stream message.
var errNoStream = errors.New("its content is not {name, text}")

// pieces reads {"name": NAME, "text": TEXT} and calls take with NAME as JSON and each
// piece of TEXT as the inside of a JSON string. Both are valid until take returns.
func pieces(in io.Reader, take func(name, text []byte) error) error {
	w := &window{in: in, buf: make([]byte, pieceBytes)}
	if c, err := w.token(); err != nil || c != '{' {
		return errors.Join(errNoStream, err)
	}
	var name []byte
	for {
		if c, err := w.token(); err != nil || c != '"' {
			return errors.Join(errNoStream, err)
		}
		key, whole, err := w.text()
		if err != nil || !whole {
			return errors.Join(errNoStream, err)
		}
		key = bytes.Clone(key)
		if c, err := w.token(); err != nil || c != ':' {
			return errors.Join(errNoStream, err)
		}
		if c, err := w.token(); err != nil || c != '"' {
			return errors.Join(errNoStream, err)
		}
		switch string(key) {
		case "name":
			text, whole, err := w.text()
			if err != nil || !whole || len(text) > 100 {
				return errors.Join(errNoStream, err)
			}
			name = append(append([]byte{'"'}, text...), '"')
			if !json.Valid(name) {
				return errNoStream
			}
		case "text":
			if name == nil {
				name = []byte(`"stdout"`)
			}
			for {
				text, whole, err := w.text()
				if err != nil {
					return err
				}
				if len(text) > 0 {
					if err := take(name, text); err != nil {
						return err
					}
				}
				if whole {
					break
				}
			}
		default:
			return errNoStream
		}
		switch c, err := w.token(); {
		case err != nil:
			return errors.Join(errNoStream, err)
		case c == '}':
			return nil
		case c != ',':
			return errNoStream
		}
	}
}

// window is the part of a text that is in memory.
type window struct {
	in   io.Reader
	buf  []byte
	r, w int
	err  error
}

// fill reads more behind what is left; false: there is no more, or no room.
func (w *window) fill() bool {
	if w.r > 0 {
		w.w = copy(w.buf, w.buf[w.r:w.w])
		w.r = 0
	}
	if w.w == len(w.buf) || w.err != nil {
		return false
	}
	n, err := w.in.Read(w.buf[w.w:])
	w.w += n
	if err != nil {
		w.err = err
	}
	return n > 0 || err == nil
}

// token is the next byte that is no space.
func (w *window) token() (byte, error) {
	for {
		for w.r < w.w {
			c := w.buf[w.r]
			w.r++
			if c != ' ' && c != '\n' && c != '\t' && c != '\r' {
				return c, nil
			}
		}
		if !w.fill() {
			if w.err == io.EOF {
				return 0, io.ErrUnexpectedEOF
			}
			return 0, w.err
		}
	}
}

// text is what there is of a JSON string, up to the window's size, cut between
// characters; whole: the string ends behind it.
func (w *window) text() (text []byte, whole bool, err error) {
	for w.fill() && w.w < len(w.buf) {
	}
	i := w.r
	for i < w.w {
		c := w.buf[i]
		switch {
		case c == '"':
			text = w.buf[w.r:i]
			w.r = i + 1
			return text, true, nil
		case c < ' ':
			return nil, false, errNoStream
		case c == '\\':
			n := escape(w.buf[i:w.w])
			if n == 0 {
				return w.cut(i)
			}
			i += n
		case c < utf8.RuneSelf:
			i++
		case !utf8.FullRune(w.buf[i:w.w]):
			return w.cut(i)
		default:
			_, n := utf8.DecodeRune(w.buf[i:w.w])
			i += n
		}
	}
	return w.cut(i)
}

func (w *window) cut(i int) ([]byte, bool, error) {
	if i == w.r {
		if w.err != nil && w.err != io.EOF {
			return nil, false, w.err
		}
		return nil, false, io.ErrUnexpectedEOF
	}
	text := w.buf[w.r:i]
	w.r = i
	return text, false, nil
}

// escape is the length of the escape at the beginning of b, both halves of a surrogate
// pair together; 0: it is cut.
func escape(b []byte) int {
	if len(b) < 2 {
		return 0
	}
	if b[1] != 'u' {
		return 2
	}
	if len(b) < 6 {
		return 0
	}
	if (b[2] == 'd' || b[2] == 'D') && (b[3] == '8' || b[3] == '9' || b[3] == 'a' || b[3] == 'A' || b[3] == 'b' || b[3] == 'B') {
		if len(b) < 12 {
			return 0
		}
		if b[6] == '\\' && b[7] == 'u' {
			return 12
		}
	}
	return 6
}
