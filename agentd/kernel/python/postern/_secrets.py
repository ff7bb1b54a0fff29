"""Secrets that this kernel was granted, in os.environ.

The host's shim asks on the control channel, without values; they come over a socket that
exists for that moment alone. A value is in os.environ of Python, not in the environment of
the process: /proc does not show it, and programs that the kernel starts have it only if
they are given it (env=dict(os.environ)). Children that are forked of the kernel, as
multiprocessing does, do not have it either: nobody could erase it there.

Before a checkpoint the shim has them erased: memory that holds them is overwritten, unless
the notebook's own variables refer to it. Each value is in two objects at most, the bytes in
os.environ and the str that a look-up returns, always the same one.
"""

import ctypes
import os
import socket
import struct
import sys
import threading

_MAX = 16 << 20
_TIMEOUT = 5

_environ = os.environ  # whatever a notebook puts in its place
_lock = threading.Lock()
_entries = {}  # by name
_by_value = {}  # by the id of the bytes in os.environ
_absent = object()

# How many references getrefcount counts of what a list alone holds.
_probe = [bytes(bytearray(range(9)))]
_ALONE = sys.getrefcount(_probe[0])
_CPYTHON = sys.implementation.name == "cpython"
# Where the characters of a str are: after a header, which is longer if not all are ASCII.
_ASCII_HEADER = sys.getsizeof("a") - 2
_HEADER = str.__basicsize__ - ctypes.sizeof(ctypes.c_void_p)
_BYTES_HEADER = bytes.__basicsize__ - 1


class _Entry:
    """One secret: the objects that hold it, each alone in a list."""

    __slots__ = ("key", "value", "text", "before")

    def __init__(self, key, value, before):
        self.key, self.value, self.text, self.before = key, [value], [], before


def _install():
    """Makes look-ups of a secret return one and the same str."""
    environ = _environ
    if getattr(environ.decodevalue, "_postern", False):
        return
    original = environ.decodevalue

    def decodevalue(value):
        entry = _by_value.get(id(value))
        if entry is None or not entry.value or entry.value[0] is not value:
            return original(value)
        if not entry.text:
            entry.text.append(original(value))
        return entry.text[0]

    decodevalue._postern = True
    environ.decodevalue = decodevalue


def _wipe_bytes(holder):
    if not holder:
        return True
    if not _CPYTHON or sys.getrefcount(holder[0]) > _ALONE:
        holder.clear()
        return False
    ctypes.memset(id(holder[0]) + _BYTES_HEADER, 0, len(holder[0]))
    holder.clear()
    return True


def _wipe_text(holder):
    if not holder:
        return True
    if not _CPYTHON or sys.getrefcount(holder[0]) > _ALONE:
        holder.clear()
        return False
    address, length = id(holder[0]), len(holder[0])
    if holder[0].isascii():
        ctypes.memset(address + _ASCII_HEADER, 0, length)
    else:
        top = max(map(ord, holder[0]))
        width = 1 if top < 0x100 else 2 if top < 0x10000 else 4
        # A copy in UTF-8, made where C code asked for one: its length and address.
        size = ctypes.c_ssize_t.from_address(address + _ASCII_HEADER).value
        copy = ctypes.c_void_p.from_address(address + _ASCII_HEADER + ctypes.sizeof(ctypes.c_ssize_t)).value
        if copy and 0 < size <= 4 * length:
            ctypes.memset(copy, 0, size)
        ctypes.memset(address + _HEADER, 0, length * width)
    holder.clear()
    return True


def _drop(name):
    """Takes a secret out of os.environ and overwrites it; False if the notebook refers to it."""
    entry = _entries.pop(name)
    _by_value.pop(id(entry.value[0]), None)
    data = _environ._data
    if data.get(entry.key) is entry.value[0]:
        if entry.before is _absent:
            del data[entry.key]
        else:
            data[entry.key] = entry.before
    wiped = _wipe_text(entry.text)
    return _wipe_bytes(entry.value) and wiped


def _receive(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_TIMEOUT)
        sock.connect(path)
        head = bytearray(4)
        _fill(sock, head)
        size = struct.unpack(">I", head)[0]
        if size > _MAX:
            raise ValueError("secrets of %d bytes" % size)
        buffer = bytearray(size)
        if size:
            _fill(sock, buffer)
        return buffer
    finally:
        sock.close()


def _fill(sock, buffer):
    view, at = memoryview(buffer), 0
    while at < len(buffer):
        n = sock.recv_into(view[at:])
        if not n:
            raise EOFError("the host hung up in the middle")
        at += n


def _erase_buffer(buffer):
    if buffer:
        ctypes.memset((ctypes.c_char * len(buffer)).from_buffer(buffer), 0, len(buffer))


def _fetch(path):
    buffer = _receive(path)
    try:
        wanted, at = {}, 0
        view = memoryview(buffer)
        while at < len(buffer):
            n = struct.unpack_from(">H", buffer, at)[0]
            name = bytes(view[at + 2 : at + 2 + n]).decode("ascii")
            at += 2 + n
            n = struct.unpack_from(">I", buffer, at)[0]
            wanted[name] = (at + 4, n)
            at += 4 + n
        with _lock:
            _install()
            data = _environ._data
            for name in [n for n in _entries if n not in wanted]:
                _drop(name)
            for name, (start, size) in wanted.items():
                key = os.fsencode(name)
                entry = _entries.get(name)
                if entry is not None:
                    # Compared without a copy.
                    if len(entry.value[0]) == size and memoryview(entry.value[0]) == view[start : start + size] and data.get(key) is entry.value[0]:
                        continue
                    _drop(name)
                before = data.get(key, _absent)
                entry = _Entry(key, bytes(view[start : start + size]), before)
                _entries[name] = entry
                _by_value[id(entry.value[0])] = entry
                data[key] = entry.value[0]
        view.release()
    finally:
        try:
            _erase_buffer(buffer)
        except BufferError:
            buffer[:] = bytes(len(buffer))


def _erase():
    with _lock:
        return [name for name in list(_entries) if not _drop(name)]


def _forked():
    """In a child: its copy of the memory goes on without secrets."""
    global _lock
    _lock = threading.Lock()  # who held it is not in this process
    try:
        _erase()
    except Exception:  # in the middle of a change: what is there is cleared anyway
        _entries.clear()
        _by_value.clear()


def _answer(content):
    try:
        op = content.get("op")
        if op == "fetch":
            _fetch(content["path"])
            return {"status": "ok"}
        if op == "erase":
            return {"status": "ok", "kept": _erase()}
        return {"status": "error", "reason": "this version knows no %.40r" % (op,)}
    except Exception as e:  # without a traceback: its frames hold values
        return {"status": "error", "reason": "%s: %.200s" % (type(e).__name__, e)}


def register(shell):
    """Makes the kernel answer the shim."""
    kernel = getattr(shell, "kernel", None)
    handlers = getattr(kernel, "control_handlers", None)
    if handlers is None:
        return

    def handle(stream, ident, parent):
        reply = _answer(parent.get("content") or {})
        kernel.session.send(stream, "postern_secrets_reply", reply, parent, ident=ident)

    handlers["postern_secrets_request"] = handle
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forked)
