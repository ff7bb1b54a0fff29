package checkpoint

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
)

// kept are the images of the newest operation of each kernel, whole and in memory, for
// who goes back to them at once: an edit and a rollback, a fork of a kernel as it is now,
// a resume. It spares the re-assembly from the store. There is one for each kernel at
// most, for keptTime, all together at most keptShare of the memory that is available, and
// none when that falls under keptSpare. It is safe for concurrent use.
type kept struct {
	log *slog.Logger

	mu     sync.Mutex
	all    map[string]*keptImages // by kernel
	size   int64
	closed bool
}

// keptImages is a directory of images. Nobody writes to its files: users get links.
type keptImages struct {
	checkpoint pagestore.ID
	dir        string
	size       int64
	remove     func()
	timer      *time.Timer
}

const (
	keptTime  = time.Minute
	keptShare = 8                // a part of the available memory
	keptSpare = 2 * spareMemory  // bytes
	keptLook  = 10 * time.Second // between two looks whether memory is short
)

func newKept(log *slog.Logger) *kept { return &kept{log: log, all: map[string]*keptImages{}} }

// keep takes a directory over, or removes it at once.
func (k *kept) keep(kernel string, c pagestore.ID, dir string, size int64, remove func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropLocked(kernel)
	if free := available(); k.closed || free < keptSpare+size || k.size+size > (free+k.size)/keptShare {
		remove()
		return
	}
	i := &keptImages{checkpoint: c, dir: dir, size: size, remove: remove}
	began := time.Now()
	i.timer = time.AfterFunc(keptLook, func() { k.look(kernel, i, began) })
	k.all[kernel] = i
	k.size += size
}

// look removes images whose time is over, or for which there is no memory any more.
func (k *kept) look(kernel string, i *keptImages, began time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.all[kernel] != i {
		return
	}
	if time.Since(began) < keptTime-keptLook/2 && available() > keptSpare {
		i.timer.Reset(keptLook)
		return
	}
	k.dropLocked(kernel)
}

func (k *kept) dropLocked(kernel string) {
	if i := k.all[kernel]; i != nil {
		i.timer.Stop()
		delete(k.all, kernel)
		k.size -= i.size
		i.remove()
	}
}

// drop forgets the images of a kernel.
func (k *kept) drop(kernel string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropLocked(kernel)
}

// dropCheckpoint forgets the images of a checkpoint.
func (k *kept) dropCheckpoint(c pagestore.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for kernel, i := range k.all {
		if i.checkpoint == c {
			k.dropLocked(kernel)
		}
	}
}

// clear forgets everything; close does, and nothing is kept any more.
func (k *kept) clear() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for kernel := range k.all {
		k.dropLocked(kernel)
	}
}

func (k *kept) close() {
	k.mu.Lock()
	k.closed = true
	k.mu.Unlock()
	k.clear()
}

// link makes links to a checkpoint's images in to, which is empty and on the same file
// system; false if there are none.
func (k *kept) link(c pagestore.ID, to string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, i := range k.all {
		if i.checkpoint != c {
			continue
		}
		entries, err := os.ReadDir(i.dir)
		for _, e := range entries {
			// What an earlier restore said is not of the checkpoint.
			if err != nil || strings.HasSuffix(e.Name(), ".log") || e.Name() == "stats-restore" {
				continue
			}
			err = os.Link(filepath.Join(i.dir, e.Name()), filepath.Join(to, e.Name()))
		}
		if err == nil {
			return true
		}
		k.log.Warn("images that are in memory not used", "err", err)
		for _, e := range entries {
			_ = os.Remove(filepath.Join(to, e.Name()))
		}
	}
	return false
}
