"""Arrow IPC streams, as far as Postern sends them, read without pyarrow.

The types are bool, integers, floats, date32, time64, timestamp, utf8 and binary (with
64-bit offsets too); all flat. With numpy, columns of numbers are arrays on the
message's own bytes; without it they are array.array.
"""

import array
import struct
import sys

numpy = None  # looked for when rows come: importing it takes a while


def _find_numpy():
    global numpy
    if numpy is None:
        try:
            import numpy
        except ImportError:  # it need not be there
            numpy = False


class Malformed(ValueError):
    """The stream is not what Arrow's format says."""


class Field:
    """A column: name, kind and what the host says of it (pg.type, ...)."""

    __slots__ = ("name", "kind", "width", "signed", "unit", "zone", "nullable", "metadata")

    def __init__(self, name, nullable, metadata):
        self.name, self.nullable, self.metadata = name, nullable, metadata
        self.kind, self.width, self.signed, self.unit, self.zone = "", 0, True, "us", None


# Flatbuffers: just enough of it.


class _Table:
    __slots__ = ("b", "at", "vt", "n")

    def __init__(self, b, at):
        self.b, self.at = b, at
        self.vt = at - struct.unpack_from("<i", b, at)[0]
        self.n = struct.unpack_from("<H", b, self.vt)[0]

    def place(self, i):
        o = 4 + 2 * i
        if o >= self.n:
            return 0
        v = struct.unpack_from("<H", self.b, self.vt + o)[0]
        return self.at + v if v else 0

    def scalar(self, i, fmt, default=0):
        p = self.place(i)
        return struct.unpack_from(fmt, self.b, p)[0] if p else default

    def table(self, i):
        p = self.place(i)
        return _Table(self.b, p + struct.unpack_from("<I", self.b, p)[0]) if p else None

    def string(self, i):
        p = self.place(i)
        if not p:
            return None
        p += struct.unpack_from("<I", self.b, p)[0]
        n = struct.unpack_from("<I", self.b, p)[0]
        return bytes(self.b[p + 4 : p + 4 + n]).decode("utf-8")

    def vector(self, i):
        """Start of the elements and how many there are."""
        p = self.place(i)
        if not p:
            return 0, 0
        p += struct.unpack_from("<I", self.b, p)[0]
        return p + 4, struct.unpack_from("<I", self.b, p)[0]

    def tables(self, i):
        p, n = self.vector(i)
        return [_Table(self.b, p + 4 * k + struct.unpack_from("<I", self.b, p + 4 * k)[0]) for k in range(n)]


_TYPES = {2: "int", 3: "float", 4: "binary", 5: "utf8", 6: "bool", 8: "date", 9: "time", 10: "timestamp", 1: "null", 19: "binary64", 20: "utf864"}
_UNITS = {0: "s", 1: "ms", 2: "us", 3: "ns"}


def _schema(t):
    fields = []
    for f in t.tables(1):
        meta = {m.string(0): m.string(1) for m in f.tables(6)}
        field = Field(f.string(0) or "", bool(f.scalar(1, "<?", False)), meta)
        kind = _TYPES.get(f.scalar(2, "<B"))
        of = f.table(3)
        if kind is None or of is None or f.vector(5)[1] or f.place(4):
            raise Malformed("column %r has an Arrow type that this module does not read" % field.name)
        field.kind = kind
        if kind == "int":
            field.width, field.signed = of.scalar(0, "<i") // 8, of.scalar(1, "<?", False)
        elif kind == "float":
            field.width = {1: 4, 2: 8}.get(of.scalar(0, "<h"), 0)
        elif kind == "date":
            if of.scalar(0, "<h", 1) != 0:
                raise Malformed("column %r is a date in milliseconds" % field.name)
            field.width = 4
        elif kind == "time":
            field.unit, field.width = _UNITS[of.scalar(0, "<h", 1)], of.scalar(1, "<i", 32) // 8
        elif kind == "timestamp":
            field.unit, field.zone, field.width = _UNITS[of.scalar(0, "<h")], of.string(1), 8
        if kind in ("int", "float") and field.width not in (1, 2, 4, 8):
            raise Malformed("column %r has numbers of a width that this module does not read" % field.name)
        fields.append(field)
    return fields


_CODES = {(1, True): "b", (1, False): "B", (2, True): "h", (2, False): "H", (4, True): "i", (4, False): "I", (8, True): "q", (8, False): "Q"}


class Column:
    """One column of one batch: values and, where some are NULL, a bitmap."""

    __slots__ = ("field", "length", "nulls", "valid", "data", "offsets")

    def __init__(self, field, length, nulls, valid, data, offsets):
        self.field, self.length, self.nulls, self.valid, self.data, self.offsets = field, length, nulls, valid, data, offsets

    def code(self):
        f = self.field
        if f.kind == "float":
            return "f" if f.width == 4 else "d"
        return _CODES[f.width, f.signed]

    def numbers(self):
        """The values of a column of fixed width, NULLs included as they come."""
        if numpy:
            return numpy.frombuffer(self.data, dtype="<" + {"b": "i1", "B": "u1", "h": "i2", "H": "u2", "i": "i4", "I": "u4", "q": "i8", "Q": "u8", "f": "f4", "d": "f8"}[self.code()], count=self.length)
        a = array.array(self.code())
        a.frombytes(self.data[: self.length * self.field.width])
        if sys.byteorder == "big":
            a.byteswap()
        return a

    def mask(self):
        """True where a value is NULL, as a numpy array; None if none is."""
        if not self.nulls:
            return None
        bits = numpy.unpackbits(numpy.frombuffer(self.valid, dtype="u1"), bitorder="little")[: self.length]
        return bits == 0

    def is_null(self, i):
        return self.nulls and not (self.valid[i >> 3] >> (i & 7)) & 1

    def pylist(self):
        """The values as Python has them: None, bool, int, float, str, bytes."""
        f = self.field
        if f.kind == "null":
            return [None] * self.length
        if f.kind == "bool":
            d = self.data
            out = [bool((d[i >> 3] >> (i & 7)) & 1) for i in range(self.length)]
        elif self.offsets is not None:
            raw, o = bytes(self.data), self.offsets
            if f.kind.startswith("utf8"):
                if raw.isascii():  # then places in bytes are places in the text
                    text = raw.decode("ascii")
                    out = [text[o[i] : o[i + 1]] for i in range(self.length)]
                else:
                    out = [raw[o[i] : o[i + 1]].decode("utf-8") for i in range(self.length)]
            else:
                out = [raw[o[i] : o[i + 1]] for i in range(self.length)]
        else:
            out = self.numbers().tolist()
        if self.nulls:
            v = self.valid
            for i in range(self.length):
                if not (v[i >> 3] >> (i & 7)) & 1:
                    out[i] = None
        return out


class Reader:
    """Reads a stream from an object with read_exactly(n), batch by batch.

    It holds one batch at a time. Iterating gives lists of Column.
    """

    def __init__(self, source):
        _find_numpy()
        self.source = source
        self.fields = None
        kind, header, _ = self._message()
        if kind != 1:
            raise Malformed("the stream does not begin with a schema")
        self.fields = _schema(header)

    def _message(self):
        word = self.source.read_exactly(4, end_ok=True)
        if not word:
            return None, None, None
        n = struct.unpack("<I", word)[0]
        if n == 0xFFFFFFFF:
            n = struct.unpack("<I", self.source.read_exactly(4))[0]
        if n == 0:
            return None, None, None
        if n > 64 << 20:
            raise Malformed("a message header of %d bytes" % n)
        meta = self.source.read_exactly(n)
        try:
            m = _Table(meta, struct.unpack_from("<I", meta, 0)[0])
            kind, header, length = m.scalar(1, "<B"), m.table(2), m.scalar(3, "<q")
        except (struct.error, IndexError) as e:
            raise Malformed("a message header that makes no sense") from e
        if not 0 <= length <= 2 << 30:
            raise Malformed("a message of %d bytes" % length)
        return kind, header, self.source.read_exactly(length) if length else b""

    def __iter__(self):
        while True:
            kind, header, body = self._message()
            if kind is None:
                return
            if kind == 3:
                yield self._batch(header, body)
            elif kind != 1:
                raise Malformed("a message of kind %s" % kind)

    def _batch(self, t, body):
        if t.place(3):
            raise Malformed("a compressed batch")
        view = memoryview(body)
        node_at, nodes = t.vector(1)
        buffer_at, buffers = t.vector(2)
        if nodes != len(self.fields):
            raise Malformed("a batch of %d columns instead of %d" % (nodes, len(self.fields)))
        at = [0]

        def buffer():
            if at[0] >= buffers:
                raise Malformed("a batch lacks buffers")
            offset, n = struct.unpack_from("<qq", t.b, buffer_at + 16 * at[0])
            at[0] += 1
            if offset < 0 or n < 0 or offset + n > len(view):
                raise Malformed("a buffer beyond its batch")
            return view[offset : offset + n]

        columns = []
        for i, f in enumerate(self.fields):
            length, nulls = struct.unpack_from("<qq", t.b, node_at + 16 * i)
            if f.kind == "null":
                columns.append(Column(f, length, length, b"", b"", None))
                continue
            valid, offsets = buffer(), None
            if nulls and len(valid) * 8 < length:
                raise Malformed("a bitmap is too short")
            if f.kind.startswith(("utf8", "binary")):
                wide = f.kind.endswith("64")
                raw = buffer()
                need = (length + 1) * (8 if wide else 4) if length else 0
                if len(raw) < need:
                    raise Malformed("offsets are too short")
                offsets = array.array("q" if wide else "i")
                offsets.frombytes(raw[:need])
                if sys.byteorder == "big":
                    offsets.byteswap()
                data = buffer()
                if length and (offsets[0] < 0 or offsets[-1] > len(data)):
                    raise Malformed("offsets beyond their data")
            else:
                data = buffer()
                if len(data) < ((length + 7) // 8 if f.kind == "bool" else length * f.width):
                    raise Malformed("values are too short")
            columns.append(Column(f, length, nulls, valid, data, offsets))
        return columns
