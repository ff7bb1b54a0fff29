"""Placeholders of a statement: which variables it asks for."""

import re

_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_BRACES = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z_0-9]*)\s*(?:\|\s*([a-z]+)\s*)?\}\}")
_DOLLAR = re.compile(r"\$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z_0-9\x80-\U0010ffff]*)?\$")


def placeholders(sql):
    """The names in {{name}} and those in :name, as two sets.

    The host decides what is a placeholder; this only finds what to send it. Names in
    quotes, comments and array slices are no placeholders.
    """
    braces, colons = set(), set()
    i, n, depth = 0, len(sql), 0
    while i < n:
        c = sql[i]
        if c in "'\"`":
            escapes = c == "'" and i > 0 and sql[i - 1] in "eE" and not (i > 1 and (sql[i - 2].isalnum() or sql[i - 2] == "_"))
            i += 1
            while i < n and sql[i] != c:
                i += 2 if escapes and sql[i] == "\\" else 1
            i += 1
        elif sql.startswith("--", i):
            end = sql.find("\n", i)
            i = n if end < 0 else end + 1
        elif sql.startswith("/*", i):
            level, i = 1, i + 2
            while i < n and level:
                if sql.startswith("/*", i):
                    level, i = level + 1, i + 2
                elif sql.startswith("*/", i):
                    level, i = level - 1, i + 2
                else:
                    i += 1
        elif c == "$" and not (i > 0 and (sql[i - 1].isalnum() or sql[i - 1] in "_$")):
            tag = _DOLLAR.match(sql, i)
            if tag:
                end = sql.find(tag.group(), tag.end())
                i = n if end < 0 else end + len(tag.group())
            else:
                i += 1
        elif sql.startswith("{{", i):
            m = _BRACES.match(sql, i)
            if m:
                braces.add(m.group(1))
                i = m.end()
            else:
                i += 2
        elif c == ":":
            if sql.startswith("::", i) or sql.startswith(":=", i):
                i += 2
                continue
            m = _NAME.match(sql, i + 1)
            if m and depth == 0:
                colons.add(m.group())
            i = m.end() if m else i + 1
        else:
            depth += (c == "[") - (c == "]")
            i += 1
    return braces, colons
