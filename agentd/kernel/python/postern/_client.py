"""The way to the host: a unix socket that belongs to this kernel alone.

One connection per statement, so that none is open while the kernel is checkpointed. A
frame is a type (1 byte), a length (4 bytes, big-endian) and a payload. The request is
one frame 'q' with JSON; the answer is frames 'd' (an Arrow IPC stream in pieces) and a
last one 'e' with JSON: the outcome. Closing the connection cancels the statement in the
database.
"""

import json
import os
import socket
import struct

from . import _arrow, _values
from ._result import Result

_MAX_REQUEST = 8 << 20
_MAX_FRAME = 1 << 20


class Error(Exception):
    """A statement that failed or was refused.

    code is Postern's (POLICY_DENIED, SQL, ...), sqlstate the database's or None,
    position counts characters of the statement from 1, or is None.
    """

    def __init__(self, message, code="", sqlstate=None, position=None, detail="", hint=""):
        super().__init__(message)
        self.code, self.sqlstate, self.position, self.detail, self.hint = code, sqlstate, position, detail, hint

    def _render_traceback_(self):
        # IPython: where in this module it was raised tells nobody anything.
        lines = ["%s: %s" % (type(self).__name__, self)]
        if self.sqlstate:
            lines[0] += " (SQLSTATE %s)" % self.sqlstate
        if self.detail:
            lines.append("DETAIL: " + self.detail)
        if self.hint:
            lines.append("HINT: " + self.hint)
        return lines


class Unavailable(Error):
    """The host can't answer at present; nothing was run, or it is not known how it ended."""


class Cancelled(Error):
    """The statement was cancelled."""


class _Connection:
    def __init__(self):
        path = os.environ.get("POSTERN_SOCKET")
        if not path:
            raise Unavailable("this Python does not run as a kernel of Postern: POSTERN_SOCKET is not set", "UNAVAILABLE")
        self._left, self._outcome, self._buffer = 0, None, b""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.connect(path)
        except OSError as e:
            self._sock.close()
            raise Unavailable("agentd on this host can't be reached at present (%s): try again" % (e.strerror or e), "UNAVAILABLE") from None
        self._file = self._sock.makefile("rb", buffering=256 << 10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._sock.close()

    def ask(self, request):
        text = json.dumps(request).encode("utf-8")
        if len(text) > _MAX_REQUEST:
            raise ValueError("the statement and its variables have %d bytes, more than %d" % (len(text), _MAX_REQUEST))
        try:
            self._sock.sendall(b"q" + struct.pack(">I", len(text)) + text)
        except OSError:
            pass  # the answer says why, if there is one

    def _frame(self):
        """Goes on to the next frame of data; False at the outcome."""
        while not self._left:
            if self._outcome is not None:
                return False
            head = self._file.read(5)
            if len(head) < 5:
                raise Unavailable("agentd went away in the middle of the answer: whether the statement ran to its end is not known", "UNAVAILABLE")
            kind, n = head[:1], struct.unpack(">I", head[1:])[0]
            if n > _MAX_FRAME:
                raise Unavailable("agentd sent a frame of %d bytes" % n, "INTERNAL")
            if kind == b"d":
                self._left = n
            elif kind == b"e":
                text = self._file.read(n)
                if len(text) < n:
                    raise Unavailable("agentd went away in the middle of the answer", "UNAVAILABLE")
                self._outcome = json.loads(text)
            else:
                raise Unavailable("agentd sent a frame of kind %r" % kind, "INTERNAL")
        return True

    def read_exactly(self, n, end_ok=False):
        out = bytearray()
        while len(out) < n:
            if not self._frame():
                if end_ok and not out:
                    return b""
                _raise(self._outcome)
                raise Unavailable("the answer ended in the middle of a batch", "INTERNAL")
            part = self._file.read(min(self._left, n - len(out)))
            if not part:
                raise Unavailable("agentd went away in the middle of the answer: whether the statement ran to its end is not known", "UNAVAILABLE")
            self._left -= len(part)
            if not out and len(part) == n:
                return part
            out += part
        return bytes(out)

    def outcome(self):
        while self._frame():
            self._left -= len(self._file.read(self._left))
        return self._outcome


def _raise(outcome):
    error = outcome.get("error")
    if not error:
        return
    code, sql = error.get("code", ""), error.get("sql") or {}
    kind = {"CANCELLED": Cancelled, "UNAVAILABLE": Unavailable, "OVERLOADED": Unavailable}.get(code, Error)
    raise kind(error.get("message", "it failed"), code, sql.get("sqlstate") or None, sql.get("position") or None, sql.get("detail", ""), sql.get("hint", ""))


def _namespace():
    try:
        from IPython import get_ipython
    except ImportError:
        return {}
    shell = get_ipython()
    return shell.user_ns if shell is not None else {}


def _placeholders(query, source):
    """The names in {{name}} and those in :name that a statement asks for, as two sets.

    agentd says it: what is a quote or a comment differs between engines.
    """
    if "{{" not in query and ":" not in query:
        return set(), set()
    with _Connection() as c:
        c.ask({"op": "placeholders", "sql": query, "source": source or ""})
        outcome = c.outcome()
    _raise(outcome)
    found = outcome["placeholders"]
    return set(found["braces"]), set(found["colons"])


def sql(query, source=None, params=None, max_rows=None, to=None, **variables):
    """Runs one statement on a data source of this host and returns a Result.

    Placeholders {{name}} and :name are taken from keyword arguments, then params, then
    the notebook's own variables. source may be left out where this kernel may use just
    one. to is 'df' (pandas), 'arrow' (pyarrow) or None. Rows beyond the policy's limits
    are an Error; max_rows asks for less.
    """
    if not isinstance(query, str):
        raise TypeError("the statement is a %s and no str" % type(query).__name__)
    if to not in (None, "df", "arrow"):
        raise ValueError("to is %r: it can be 'df' or 'arrow'" % (to,))
    given = dict(params or {})
    given.update(variables)
    braces, colons = _placeholders(query, source)
    names, live = dict(given), _namespace()
    for name in sorted(braces | colons):
        if name in names:
            continue
        if name in live:
            names[name] = live[name]
        elif name in braces:
            raise NameError("the statement asks for {{%s}}, and there is no variable of that name" % name)
    parameters = [_values.parameter(name, value) for name, value in names.items()]
    request = {"op": "sql", "sql": query, "source": source or "", "parameters": parameters}
    if max_rows is not None:
        request["max_rows"] = int(max_rows)
    with _Connection() as c:
        c.ask(request)
        fields, batches = [], []
        if c._frame():
            reader = _arrow.Reader(c)
            fields = reader.fields
            batches = list(reader)
        outcome = c.outcome()
    _raise(outcome)
    result = Result(fields, batches, outcome)
    if to == "df":
        return result.to_dataframe()
    if to == "arrow":
        return result.to_arrow()
    return result


def sources():
    """The data sources that this kernel may use: a list of dictionaries."""
    with _Connection() as c:
        c.ask({"op": "sources"})
        outcome = c.outcome()
    _raise(outcome)
    return outcome.get("sources") or []
