//go:build !linux

package tunnel

import (
	"context"
	"errors"
)

// WatchNetwork is not available here.
func WatchNetwork(context.Context) (<-chan struct{}, error) {
	return nil, errors.New("watching the network: only on linux")
}
