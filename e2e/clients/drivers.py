"""Python's PostgreSQL drivers against a read-only data source of Postern.

usage: drivers.py psycopg2|psycopg|asyncpg|pg8000

Host, port, user, password, database and CA come from PGHOST, PGPORT, ... as libpq has
them. Each driver reads, binds, prepares, streams, is refused a write, goes on, and cancels.
Ends with "ok".
"""
import asyncio
import os
import ssl
import sys
import threading
import time

HOST, PORT = os.environ["PGHOST"], int(os.environ["PGPORT"])
USER, PASSWORD, DATABASE = os.environ["PGUSER"], os.environ["PGPASSWORD"], os.environ["PGDATABASE"]
CA = os.environ["PGSSLROOTCERT"]


def check(got, want, what):
    if got != want:
        sys.exit("%s: got %r, want %r" % (what, got, want))


def refused(f, kind, code, what):
    """f fails with this SQLSTATE."""
    try:
        f()
    except kind as e:
        got = getattr(e, "pgcode", None) or getattr(e, "sqlstate", None) or (e.args and isinstance(e.args[0], dict) and e.args[0].get("C"))
        if not got and isinstance(e.args, tuple):  # pg8000 1.10 has ("ERROR", "ERROR", code, ...)
            got = next((a for a in e.args if a == code), None)
        check(got, code, what + ": %s" % (e,))
        return
    sys.exit(what + " was not refused")


def dbapi(connect, error, cancel=None, named=None):
    """What every DB-API driver does."""
    db = connect()
    c = db.cursor()
    c.execute("select 1, 'two', null, 3.5::numeric, true, date '2026-11-22', array[1,2,3]")
    row = c.fetchone()
    check((row[0], row[1], row[2], str(row[3]), row[4], str(row[5]), list(row[6])), (1, "two", None, "3.5", True, "2026-11-22", [1, 2, 3]), "a row of types")
    for i in range(12):  # often enough to be prepared on the server
        c.execute("select name from customers where id = %s", (i % 3 + 1,))
        check(c.fetchone()[0], "customer %d" % (i % 3 + 1), "a parameter")
    db.rollback()
    if named:
        s = named(db)
        s.execute("select id from orders order by id")
        check(sum(1 for _ in s), 5000, "rows of a server-side cursor")
        db.rollback()
    refused(lambda: c.execute("delete from orders"), error, "25006", "delete")
    refused(lambda: c.execute("select 1"), error, "25P02", "a statement in a failed transaction")
    db.rollback()
    refused(lambda: c.execute("select nothing from orders"), error, "42703", "an unknown column")
    db.rollback()
    c.execute("select count(*) from orders")
    check(c.fetchone()[0], 5000, "after the refusals")
    db.rollback()
    if cancel:
        threading.Timer(0.5, cancel, (db,)).start()
        began = time.time()
        refused(lambda: c.execute("select pg_sleep(60)"), error, "57014", "a cancelled statement")
        if time.time() - began > 30:
            sys.exit("the cancel came late")
        db.rollback()
        c.execute("select 'alive'")
        check(c.fetchone()[0], "alive", "after the cancel")
    db.close()


def run_psycopg2():
    import io
    import psycopg2

    connect = lambda: psycopg2.connect("sslmode=verify-full application_name=drivers")
    dbapi(connect, psycopg2.Error, lambda db: db.cancel(), lambda db: db.cursor("streaming"))
    db = connect()
    out = io.StringIO()
    db.cursor().copy_expert("copy (select id, name from customers order by id) to stdout with csv header", out)
    check(out.getvalue().splitlines()[:2], ["id,name", "1,customer 1"], "copy to stdout")
    db.close()


def run_psycopg():
    import psycopg

    connect = lambda: psycopg.connect("sslmode=verify-full application_name=drivers")
    dbapi(connect, psycopg.Error, lambda db: db.cancel(), lambda db: db.cursor("streaming"))
    with connect() as db:
        with db.pipeline():
            cursors = [db.execute("select %s::int8 * 2", (i,)) for i in range(50)]
        check([c.fetchone()[0] for c in cursors], [2 * i for i in range(50)], "a pipeline")
        db.rollback()
        with db.cursor(binary=True) as c:
            c.execute("select id, amount, at from orders order by id limit 1")
            row = c.fetchone()
            check((row[0], str(row[1])), (1, "0.25"), "binary results")
        with db.cursor() as c, c.copy("copy customers (id, name) to stdout (format binary)") as copy:
            copy.set_types(["int4", "text"])
            check(sum(1 for _ in copy.rows()), 100, "rows of a binary copy")
        check(sum(1 for _ in db.cursor().stream("select * from orders")), 5000, "single-row mode")
        db.rollback()
    with psycopg.connect("sslmode=verify-full", autocommit=True) as db:
        with db.transaction():
            db.execute("select 1")
            try:
                with db.transaction():  # a savepoint
                    db.execute("select 1/0")
            except psycopg.errors.DivisionByZero:
                pass
            check(db.execute("select 2").fetchone()[0], 2, "after a savepoint was rolled back")


def run_pg8000():
    import pg8000

    dbapi(lambda: pg8000.connect(user=USER, host=HOST, port=PORT, database=DATABASE, password=PASSWORD, ssl=True), pg8000.ProgrammingError)


def run_asyncpg():
    import asyncpg

    context = ssl.create_default_context(cafile=CA)
    options = dict(host=HOST, port=PORT, user=USER, password=PASSWORD, database=DATABASE, ssl=context)

    async def expect(code, coroutine, what):
        try:
            await coroutine
        except asyncpg.PostgresError as e:
            check(e.sqlstate, code, what + ": %s" % e)
            return
        sys.exit(what + " was not refused")

    async def main():
        db = await asyncpg.connect(**options)
        row = await db.fetchrow("select 1::int4 as a, 'x'::text as b, $1::int8[] as c, $2::jsonb as d, now() as e", [1, 2], '{"k": 1}')
        check((row["a"], row["b"], row["c"], row["d"]), (1, "x", [1, 2], '{"k": 1}'), "binary parameters and results")
        check(await db.fetchval("select kind from orders where id = $1", 2), "even", "an enum")
        async with db.transaction(readonly=True):
            n = 0
            async for _ in db.cursor("select id from orders", prefetch=500):
                n += 1
            check(n, 5000, "rows of a cursor")
        await expect("25006", db.execute("delete from orders"), "delete")
        await expect("57014", cancelled(db), "a cancelled statement")
        check(await db.fetchval("select count(*) from orders"), 5000, "after the refusals")
        await db.close()
        async with asyncpg.create_pool(min_size=2, max_size=4, **options) as pool:
            check(sorted(await asyncio.gather(*(pool.fetchval("select $1::int4", i) for i in range(20)))), list(range(20)), "a pool")

    async def cancelled(db):
        task = asyncio.ensure_future(db.execute("select pg_sleep(60)"))
        await asyncio.sleep(0.5)
        other = await asyncpg.connect(**options)
        await other.close()
        task.cancel()  # asyncpg sends a cancel request
        try:
            await task
        except asyncio.CancelledError:
            raise asyncpg.QueryCanceledError("cancelled")

    asyncio.run(main())


globals()["run_" + sys.argv[1]]()
print("ok")
