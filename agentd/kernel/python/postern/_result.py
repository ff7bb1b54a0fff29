"""What a statement gave, and how Python sees it."""

import datetime
import decimal
import html
import uuid

from . import _arrow

_EPOCH_DAY = datetime.date(1970, 1, 1).toordinal()
_EPOCH = datetime.datetime(1970, 1, 1)
_UTC = datetime.timezone.utc
_LAST_DAY = datetime.date.max.toordinal() - _EPOCH_DAY
_FIRST_DAY = datetime.date.min.toordinal() - _EPOCH_DAY
_DAY = 86_400_000_000


def _civil(days):
    """Year, month and day of any day since 1970, in the Gregorian calendar."""
    # Days are counted from 0000-03-01, so that a leap day is a year's last.
    z = days + 719468
    era, doe = divmod(z, 146097)
    yoe = (doe - doe // 1460 + doe // 36524 - doe // 146096) // 365
    doy = doe - (365 * yoe + yoe // 4 - yoe // 100)
    mp = (5 * doy + 2) // 153
    month = mp + 3 if mp < 10 else mp - 9
    return yoe + era * 400 + (month <= 2), month, doy - (153 * mp + 2) // 5 + 1


def _date_text(days):
    year, month, day = _civil(days)
    return "%04d-%02d-%02d" % (year if year > 0 else 1 - year, month, day), ("" if year > 0 else " BC")


def _date(days):
    if _FIRST_DAY <= days <= _LAST_DAY:
        return datetime.date.fromordinal(days + _EPOCH_DAY)
    if days == 2**31 - 1:
        return "infinity"
    if days == -(2**31):
        return "-infinity"
    return "".join(_date_text(days))


def _timestamp(zone):
    tz = _UTC if zone else None

    def convert(us):
        days, rest = divmod(us, _DAY)
        if _FIRST_DAY <= days <= _LAST_DAY:
            return (_EPOCH + datetime.timedelta(days=days, microseconds=rest)).replace(tzinfo=tz)
        if us == 2**63 - 1:
            return "infinity"
        if us == -(2**63):
            return "-infinity"
        date, era = _date_text(days)
        return date + " " + _clock(rest) + ("+00" if zone else "") + era

    return convert


def _clock(us):
    seconds, us = divmod(us, 1_000_000)
    text = "%02d:%02d:%02d" % (seconds // 3600, seconds // 60 % 60, seconds % 60)
    return text + (".%06d" % us).rstrip("0") if us else text


def _time(us):
    if 0 <= us < _DAY:
        seconds, us = divmod(us, 1_000_000)
        return datetime.time(seconds // 3600, seconds // 60 % 60, seconds % 60, us)
    return _clock(us)  # 24:00:00, which Python's time does not have


def _converter(field):
    """From what Arrow holds to what Python's users expect; None: as it is."""
    if field.kind == "date":
        return _date
    if field.kind == "time":
        return _time
    if field.kind == "timestamp":
        return _timestamp(field.zone)
    if field.kind == "utf8" and "postern.mask" not in field.metadata:
        kind = field.metadata.get("pg.type")
        if kind == "numeric":
            return decimal.Decimal
        if kind == "uuid":
            return uuid.UUID
    return None


class Result:
    """The rows of a statement.

    Iterating gives tuples; columns are names in order. to_dataframe() and to_arrow()
    need pandas and pyarrow. Dates and times beyond those of Python, and infinite ones,
    are the texts that PostgreSQL writes.
    """

    def __init__(self, fields, batches, outcome):
        self._fields, self._batches, self._rows = fields, batches, None
        self.columns = [f.name for f in fields]
        self.types = [f.metadata.get("pg.type") or f.metadata.get("mysql.type") or f.kind for f in fields]
        self.outcome = outcome
        self.notices = outcome.get("notices") or []
        self.tag = outcome.get("command_tag", "")

    def __len__(self):
        return sum(b[0].length if b else 0 for b in self._batches) if self._fields else int(self.outcome.get("rows") or 0)

    @property
    def rows(self):
        """All rows, as tuples."""
        if self._rows is None:
            self._rows = [row for batch in self._batches for row in self._batch_rows(batch)]
            if not self._fields:
                self._rows = [()] * len(self)
        return self._rows

    def _batch_rows(self, batch):
        columns = []
        for column in batch:
            values, convert = column.pylist(), _converter(column.field)
            columns.append(values if convert is None else [None if v is None else convert(v) for v in values])
        return zip(*columns)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def scalar(self):
        """The one value of a result of one row and one column."""
        if len(self) != 1 or len(self.columns) != 1:
            raise ValueError("the result has %d rows and %d columns, not one of each" % (len(self), len(self.columns)))
        return self.rows[0][0]

    def dicts(self):
        """All rows, as dictionaries; of columns of one name the last one counts."""
        return [dict(zip(self.columns, row)) for row in self.rows]

    def to_dataframe(self):
        """A pandas DataFrame. Integers and booleans with NULLs have pandas's nullable
        types, floats NaN; dates, numerics and what datetime64 can't hold are objects."""
        import pandas

        data = [_series(pandas, i, f, [b[i] for b in self._batches]) for i, f in enumerate(self._fields)]
        frame = pandas.DataFrame(dict(enumerate(data)), index=pandas.RangeIndex(len(self)))
        frame.columns = self.columns
        return frame

    def to_arrow(self):
        """A pyarrow Table."""
        import pyarrow

        schema = pyarrow.schema([pyarrow.field(f.name, _pyarrow_type(pyarrow, f), f.nullable, f.metadata) for f in self._fields])
        batches = []
        for batch in self._batches:
            arrays = []
            for c, field in zip(batch, schema):
                buffers = [pyarrow.py_buffer(c.valid) if c.nulls else None]
                if c.offsets is not None:
                    buffers.append(pyarrow.py_buffer(c.offsets if len(c.offsets) else b"\0" * 8))
                if c.field.kind != "null":
                    buffers.append(pyarrow.py_buffer(c.data))
                arrays.append(pyarrow.Array.from_buffers(field.type, c.length, buffers, c.nulls))
            batches.append(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))
        return pyarrow.Table.from_batches(batches, schema)

    def __repr__(self):
        if not self.columns:
            return self.tag or "no rows"
        shown = [[_short(v) for v in row] for row in self._head(20)]
        widths = [max([len(c)] + [len(r[i]) for r in shown]) for i, c in enumerate(self.columns)]
        out = [" | ".join(c.ljust(w) for c, w in zip(self.columns, widths)), "-+-".join("-" * w for w in widths)]
        out += [" | ".join(v.ljust(w) for v, w in zip(row, widths)).rstrip() for row in shown]
        n = len(self)
        out.append("(%d row%s%s)" % (n, "" if n == 1 else "s", ", 20 shown" if n > 20 else ""))
        return "\n".join(out)

    def _repr_html_(self):
        if not self.columns:
            return "<p>%s</p>" % html.escape(self.tag or "no rows")
        head = "".join("<th>%s</th>" % html.escape(c) for c in self.columns)
        body = "".join("<tr>%s</tr>" % "".join("<td>%s</td>" % html.escape(_short(v)) for v in row) for row in self._head(20))
        n = len(self)
        return "<table><thead><tr>%s</tr></thead><tbody>%s</tbody></table><p>%d row%s%s</p>" % (head, body, n, "" if n == 1 else "s", ", 20 shown" if n > 20 else "")

    def _head(self, n):
        if self._rows is not None:
            return self._rows[:n]
        out = []
        for batch in self._batches:
            for row in self._batch_rows(batch):
                out.append(row)
                if len(out) == n:
                    return out
        return out


def _short(value):
    text = "" if value is None else str(value)
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return text if len(text) <= 80 else text[:77] + "..."


def _series(pandas, i, field, columns):
    kind = field.kind
    nulls = any(c.nulls for c in columns)
    numpy = _arrow.numpy  # pandas is there, so it is
    if kind in ("int", "float") and columns:
        values = numpy.concatenate([c.numbers() for c in columns])
        if not nulls:
            return values
        mask = numpy.concatenate([c.mask() if c.nulls else numpy.zeros(c.length, dtype=bool) for c in columns])
        if kind == "float":
            values = values.copy()
            values[mask] = numpy.nan
            return values
        return pandas.arrays.IntegerArray(values.copy(), mask)
    if kind == "int":
        return numpy.empty(0, dtype="%s%d" % ("i" if field.signed else "u", field.width))
    if kind == "float":
        return numpy.empty(0, dtype="f%d" % field.width)
    if kind == "bool":
        bits = [numpy.unpackbits(numpy.frombuffer(c.data, dtype="u1"), bitorder="little")[: c.length].astype(bool) for c in columns]
        values = numpy.concatenate(bits) if bits else numpy.empty(0, dtype=bool)
        if not nulls:
            return values
        mask = numpy.concatenate([c.mask() if c.nulls else numpy.zeros(c.length, dtype=bool) for c in columns])
        return pandas.arrays.BooleanArray(values, mask)
    if kind == "timestamp":
        raw = numpy.concatenate([c.numbers() for c in columns]) if columns else numpy.empty(0, dtype="i8")
        mask = numpy.concatenate([c.mask() if c.nulls else numpy.zeros(c.length, dtype=bool) for c in columns]) if nulls else None
        seen = raw if mask is None else raw[~mask]
        limit = (2**63 - 1) // 1000  # what nanoseconds can hold
        if not len(seen) or (seen.min() >= -limit and seen.max() <= limit):
            stamps = raw.astype("M8[us]").astype("M8[ns]") if mask is None else numpy.where(mask, 0, raw).astype("M8[us]").astype("M8[ns]")
            if mask is not None:
                stamps[mask] = numpy.datetime64("NaT")
            series = pandas.Series(stamps)
            return series.dt.tz_localize("UTC") if field.zone else series
    convert = _converter(field)
    values = []
    for c in columns:
        part = c.pylist()
        values += part if convert is None else [None if v is None else convert(v) for v in part]
    out = numpy.empty(len(values), dtype=object)
    out[:] = values
    return out


def _pyarrow_type(pyarrow, f):
    if f.kind == "int":
        return getattr(pyarrow, "%sint%d" % ("" if f.signed else "u", 8 * f.width))()
    if f.kind == "float":
        return pyarrow.float32() if f.width == 4 else pyarrow.float64()
    if f.kind == "date":
        return pyarrow.date32()
    if f.kind == "time":
        return pyarrow.time64(f.unit) if f.width == 8 else pyarrow.time32(f.unit)
    if f.kind == "timestamp":
        return pyarrow.timestamp(f.unit, f.zone)
    return {"bool": pyarrow.bool_, "utf8": pyarrow.string, "utf864": pyarrow.large_string, "binary": pyarrow.binary, "binary64": pyarrow.large_binary, "null": pyarrow.null}[f.kind]()
