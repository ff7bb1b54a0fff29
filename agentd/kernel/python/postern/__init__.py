"""Postern in a notebook: SQL on the host's data sources, without credentials.

    import postern
    postern.sources()                                   # what may be asked
    postern.sql("select * from t where id = {{n}}", source="warehouse")

and the magics %sql and %%sql, which are there without an import:

    %%sql --source warehouse --to df
    select * from orders where day >= {{since}}

{{name}} and :name are live variables of the notebook, bound as typed parameters:
they are never pasted into the text. {{name|list}} is a list, for IN;
{{name|identifier}} a name of a table or a column. Rows go from the database to this
kernel and never leave the host.

postern.on_restore(f) has f called before the first cell after the kernel was brought
back from a checkpoint. A fork's random numbers are seeded anew.
"""

from ._client import Cancelled, Error, Unavailable, sources, sql
from ._restored import Restored, on_restore
from ._result import Result

# After a fork, random numbers are seeded anew, unless this is False: see on_restore, too.
reseed_on_fork = True

__all__ = ["sql", "sources", "on_restore", "Restored", "Result", "Error", "Unavailable", "Cancelled", "load_ipython_extension"]


def load_ipython_extension(shell):
    """Registers %sql and %%sql, and what secrets and restores come by; done at the kernel's start."""
    from . import _magic, _restored, _secrets

    _magic.register(shell)
    _restored.register(shell)
    _secrets.register(shell)
