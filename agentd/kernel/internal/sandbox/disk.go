package sandbox

import "context"

func (s *Sandbox) watchDisk(ctx context.Context) { <-ctx.Done() }
