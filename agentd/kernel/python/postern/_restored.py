"""What a kernel has to do after it was brought back from a checkpoint.

The host writes a file into the kernel's run directory before each restore. The first
cell after it finds that the file has another token than the last one, and before any of
the cell's code runs:

- OpenSSL's generator (module ssl) gets fresh entropy, whatever kind of restore it was:
  it must never say the same twice;
- after a fork the generators of random, numpy.random and torch are seeded anew, and
  those that are variables of the notebook (random.Random, numpy's Generator and
  RandomState, torch.Generator), unless postern.reseed_on_fork is False. A resume and a
  move go on where they were, and a rollback draws what it drew: those are one kernel;
- uuid.uuid1 takes another clock sequence after a fork;
- functions that were given to postern.on_restore are called.

secrets, os.urandom and uuid.uuid4 ask the system and need nothing.
"""

import json
import os
import sys

# The tests change it.
PATH = "/run/postern/restored.json"

_MAX = 64 << 10

_seen = None
_callbacks = []


class Restored:
    """How a kernel was brought back.

    kind        "fork", "rollback", "resume" or "move"
    checkpoint  the checkpoint's id
    away        seconds between the checkpoint and the restore, by the hosts' clocks
    """

    __slots__ = ("kind", "checkpoint", "away")

    def __init__(self, kind, checkpoint, away):
        self.kind, self.checkpoint, self.away = kind, checkpoint, away

    def __repr__(self):
        return f"Restored(kind={self.kind!r}, checkpoint={self.checkpoint!r}, away={self.away:.1f})"


def on_restore(callback):
    """Has callback(restored) called before the first cell after each restore.

    It can be used as a decorator. What it raises is shown, and stops nothing.
    """
    if callback not in _callbacks:
        _callbacks.append(callback)
    return callback


def _read():
    try:
        with open(PATH, "rb") as f:
            said = json.loads(f.read(_MAX))
        return said if isinstance(said, dict) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return None


def check(user_ns=None):
    """Does what is due since the last restore. Returns a Restored, or None."""
    global _seen
    said = _read()
    token = said.get("token") if said else None
    if token is None or token == _seen:
        return None
    _seen = token
    try:
        away = max(0.0, float(said.get("restored", 0)) - float(said.get("saved", 0)))
    except (TypeError, ValueError):
        away = 0.0
    restored = Restored(str(said.get("kind", "")), str(said.get("checkpoint", "")), away)
    _stir()
    package = sys.modules.get(__package__)
    if restored.kind == "fork" and getattr(package, "reseed_on_fork", True):
        _reseed(user_ns or {})
    for callback in list(_callbacks):
        try:
            callback(restored)
        except Exception:  # the user's code
            import traceback

            traceback.print_exc()
    return restored


def _stir():
    ssl = sys.modules.get("ssl") or sys.modules.get("_ssl")
    if ssl is not None:
        try:
            ssl.RAND_add(os.urandom(48), 48.0)
        except Exception:  # a build without it
            pass


def _reseed(user_ns):
    """Seeds what this module knows anew. One that fails stops no other."""
    for seed in (_random, _numpy, _torch, _uuid):
        try:
            seed()
        except Exception:  # a version that does it otherwise
            pass
    for value in list(user_ns.values()):
        try:
            _one(value)
        except Exception:
            pass


def _random():
    random = sys.modules.get("random")
    if random is not None:
        random.seed()


def _numpy():
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()


def _torch():
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.seed()


def _uuid():
    uuid = sys.modules.get("uuid")
    if uuid is not None and hasattr(uuid, "_generate_time_safe"):
        uuid._generate_time_safe = None  # libuuid keeps its clock sequence to itself
        uuid._last_timestamp = None


def _one(value):
    random, numpy, torch = sys.modules.get("random"), sys.modules.get("numpy.random"), sys.modules.get("torch")
    if random is not None and isinstance(value, random.Random):
        value.seed()
    elif numpy is not None and isinstance(value, getattr(numpy, "Generator", ())):
        bits = value.bit_generator
        bits.state = type(bits)().state
    elif numpy is not None and isinstance(value, getattr(numpy, "RandomState", ())):
        value.seed()
    elif torch is not None and isinstance(value, getattr(torch, "Generator", ())):
        value.seed()


def register(shell):
    """Looks before each cell, silent ones too: one stat of a small file."""
    global _seen
    said = _read()
    _seen = said.get("token") if said else None
    last = [None]

    def before(*_):
        try:
            st = os.stat(PATH)
        except OSError:
            return
        now = (st.st_ino, st.st_mtime_ns, st.st_size)
        if now != last[0]:
            last[0] = now
            check(shell.user_ns)

    shell.events.register("pre_execute", before)

