"""%sql and %%sql."""

import argparse
import shlex

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from . import _client


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _client.Error("%%sql: %s" % message, "INVALID")

    def exit(self, status=0, message=None):
        raise _client.Error(message or "", "INVALID")


def _parser():
    p = _Parser(prog="%%sql", add_help=False, allow_abbrev=False)
    p.add_argument("--source", "-s", default=None)
    p.add_argument("--to", default=None)
    p.add_argument("--arrow", action="store_true")
    p.add_argument("--max-rows", type=int, default=None)
    p.add_argument("-p", dest="params", action="append", default=[], metavar="NAME=VALUE")
    return p


HELP = """%%sql [--source NAME] [--to VARIABLE] [--arrow] [--max-rows N] [-p NAME=VALUE]...
  the statement, with {{name}} for variables of the notebook

--source   the data source; may be left out where this kernel may use just one
--to       put the rows into this variable (a DataFrame if pandas is there) and show nothing
--arrow    a pyarrow Table instead
-p         a variable for this statement alone, as text"""


@magics_class
class PosternMagics(Magics):
    @no_var_expand  # else IPython itself makes {n} of {{n}}
    @line_cell_magic
    def sql(self, line, cell=None):
        """Runs SQL on a data source of this host: %%sql --help."""
        if line.strip() in ("--help", "-h", "?") or (cell is None and not line.strip()):
            print(HELP)
            return None
        if cell is None:
            line, cell = _split(line)
        try:
            words = shlex.split(line)
        except ValueError as e:
            raise _client.Error("%%%%sql: %s" % e, "INVALID") from None
        a = _parser().parse_args(words)
        params = {}
        for p in a.params:
            name, eq, value = p.partition("=")
            if not eq or not name.isidentifier():
                raise _client.Error("%%%%sql: -p takes NAME=VALUE, and %r is not of that form" % p, "INVALID")
            params[name] = value
        if a.to is not None and not a.to.isidentifier():
            raise _client.Error("%%%%sql: --to takes the name of a variable, and %r is none" % a.to, "INVALID")
        result = _client.sql(cell, source=a.source, params=params, max_rows=a.max_rows)
        value = _shape(result, a.arrow)
        if a.to is not None:
            self.shell.user_ns[a.to] = value
            print("%s: %d row%s" % (a.to, len(result), "" if len(result) == 1 else "s"))
            return None
        return value


def _split(line):
    """The options of a line magic end where the statement begins."""
    rest, options = line.strip(), []
    while rest.startswith("-") and not rest.startswith("-- "):
        word, _, tail = rest.partition(" ")
        options.append(word)
        rest = tail.strip()
        if "=" not in word and word not in ("--arrow",):
            value, _, rest = rest.partition(" ")
            options.append(value)
            rest = rest.strip()
    return " ".join(options), rest


def _shape(result, arrow):
    if arrow:
        return result.to_arrow()
    if not result.columns:
        return result
    try:
        import pandas  # noqa: F401
    except ImportError:
        return result
    return result.to_dataframe()


def register(shell):
    """Registers the magics in an IPython shell."""
    shell.register_magics(PosternMagics)
