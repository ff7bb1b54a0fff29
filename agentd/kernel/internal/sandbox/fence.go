package sandbox

import (
	"errors"
	"os"
)

type fence struct{}

func newFence(n Network, _ *os.File) (*fence, error) {
	if n.Mode != NetworkNone {
		return nil, errors.New("network " + string(n.Mode) + " is not built yet: use none")
	}
	return &fence{}, nil
}
func (f *fence) close() {}
