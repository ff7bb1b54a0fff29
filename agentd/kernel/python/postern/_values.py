"""Python's values as typed parameters."""

import datetime
import decimal
import json
import math
import uuid

MAX_LIST = 10_000


def parameter(name, value):
    """One parameter as the host takes it: name, text (None: NULL), type."""
    if isinstance(value, (list, tuple, set, frozenset)) or _is_array(value):
        items = value.tolist() if _is_array(value) else list(value)
        if len(items) > MAX_LIST:
            raise ValueError("variable %r: a list of %d elements is longer than %d" % (name, len(items), MAX_LIST))
        texts, common = [], None
        for i, item in enumerate(items):
            text, kind = _scalar("%s[%d]" % (name, i), item)
            texts.append(text)
            if text is None:
                continue
            if common is None or common == kind:
                common = kind
            elif {common, kind} <= {"int8", "float8", "numeric"}:
                common = "numeric"
            else:
                raise ValueError("variable %r: a list has elements of one kind: element %d is another than those before" % (name, i))
        return {"name": name, "value": json.dumps(texts), "type": common or ""}
    text, kind = _scalar(name, value)
    return {"name": name, "value": text, "type": kind}


def _is_array(value):
    """Arrays and columns of numpy and pandas, which need not be there."""
    return type(value).__module__.split(".")[0] in ("numpy", "pandas") and hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1


def _scalar(name, value):
    if type(value).__module__.split(".")[0] == "pandas":
        if type(value).__name__ in ("NaTType", "NAType"):
            return None, ""
        if hasattr(value, "to_pydatetime"):
            if getattr(value, "nanosecond", 0):
                raise ValueError("variable %r has nanoseconds, which databases do not keep: round it" % name)
            value = value.to_pydatetime()
        elif hasattr(value, "to_pytimedelta"):
            value = value.to_pytimedelta()
    elif type(value).__module__ == "numpy" and hasattr(value, "item"):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        if kind == "M":
            import numpy

            if numpy.isnat(value):
                return None, ""
            text = str(value)
            return text, "date" if "T" not in text else "timestamp"
        if kind == "f" and value.dtype.itemsize < 8:
            return str(value), "float8"
        value = value.item()
    if value is None:
        return None, ""
    if isinstance(value, bool):
        return ("true" if value else "false"), "bool"
    if isinstance(value, int):
        return str(int(value)), ("int8" if -(2**63) <= value < 2**63 else "numeric")
    if isinstance(value, float):
        if math.isinf(value):
            return ("Infinity" if value > 0 else "-Infinity"), "float8"
        return ("NaN" if math.isnan(value) else repr(float(value))), "float8"
    if isinstance(value, decimal.Decimal):
        if value.is_snan():
            raise ValueError("variable %r is a signalling NaN" % name)
        return ("NaN" if value.is_nan() else str(value)), "numeric"
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("variable %r has characters that are no text (lone surrogates)" % name) from None
        return str(value), ""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "\\x" + bytes(value).hex(), "bytea"
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" "), ("timestamptz" if value.tzinfo is not None else "timestamp")
    if isinstance(value, datetime.date):
        return value.isoformat(), "date"
    if isinstance(value, datetime.time):
        return value.isoformat(), ("timetz" if value.tzinfo is not None else "time")
    if isinstance(value, datetime.timedelta):
        micros = (value.days * 86400 + value.seconds) * 1_000_000 + value.microseconds
        sign, micros = ("-" if micros < 0 else ""), abs(micros)
        return "%s%d.%06d seconds" % (sign, micros // 1_000_000, micros % 1_000_000), "interval"
    if isinstance(value, uuid.UUID):
        return str(value), "uuid"
    raise TypeError(
        "variable %r is a %s, which can't be bound: use None, bool, int, float, Decimal, str, bytes, "
        "date, datetime, time, timedelta, UUID or a list of one of them" % (name, type(value).__name__)
    )
