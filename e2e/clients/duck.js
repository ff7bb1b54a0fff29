// DuckDB on a directory, which may be a mounted workspace.
//
//   node duck.js write DIR   writes Parquet, CSV, partitions and a database of DuckDB's own there, and reads them
//   node duck.js read DIR    reads them
//
// Ends with "ok".
const assert = require('assert')
const fs = require('fs')
const path = require('path')
const { DuckDBInstance } = require('@duckdb/node-api')

const rows = 400_000
const [what, dir] = process.argv.slice(2)
const at = (name) => `'${path.join(dir, name).replaceAll("'", "''")}'`

// one is the only row of a statement, as texts.
async function one (connection, sql) {
  const reader = await connection.runAndReadAll(sql)
  const all = reader.getRows()
  assert.strictEqual(all.length, 1, sql)
  return all[0].map(String)
}

const sums = 'count(*), sum(id), sum(cents), count(DISTINCT city), min(note), count(note), max(moment)::VARCHAR'

async function write (c) {
  await c.run(`CREATE TABLE t AS SELECT i AS id, (i * 7919) % 100003 AS cents, 'city ' || (i % 97) AS city,
    CASE WHEN i % 3 = 0 THEN 'a "quoted", note
of ' || i END AS note, TIMESTAMP '2026-11-22 12:00:00' + INTERVAL (i) SECOND AS moment FROM range(${rows}) r(i)`)
  await c.run(`COPY t TO ${at('t.parquet')} (FORMAT parquet, ROW_GROUP_SIZE 50000)`)
  await c.run(`COPY t TO ${at('small.parquet')} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 2048)`)
  await c.run(`COPY t TO ${at('t.csv')} (FORMAT csv, HEADER)`)
  await c.run(`COPY t TO ${at('t.csv.gz')} (FORMAT csv, HEADER, COMPRESSION gzip)`)
  await c.run(`COPY (SELECT *, id % 8 AS part FROM t) TO ${at('parts')} (FORMAT parquet, PARTITION_BY (part))`)
  // What is there is written over.
  await c.run(`COPY t TO ${at('t.parquet')} (FORMAT parquet)`)
}

async function read (c) {
  const want = [String(rows), String((rows - 1) * rows / 2)]
  let first
  for (const source of [
    `read_parquet(${at('t.parquet')})`, `read_parquet(${at('small.parquet')})`,
    `read_csv(${at('t.csv')}, types = {'moment': 'TIMESTAMP'})`, `read_csv(${at('t.csv.gz')}, types = {'moment': 'TIMESTAMP'})`,
    `read_parquet(${at('parts/*/*.parquet')}, hive_partitioning = true)`
  ]) {
    const got = await one(c, `SELECT ${sums} FROM ${source}`)
    assert.deepStrictEqual(got.slice(0, 2), want, source)
    assert.strictEqual(got[3], '97', source)
    assert.strictEqual(got[5], String(Math.ceil(rows / 3)), source)
    first ??= got
    assert.deepStrictEqual(got, first, source)
  }
  // One row group, one column and one partition of many: reads at offsets.
  assert.deepStrictEqual(await one(c, `SELECT cents FROM read_parquet(${at('small.parquet')}) WHERE id = 123456`), [String((123456 * 7919) % 100003)])
  assert.deepStrictEqual(await one(c, `SELECT count(*) FROM read_parquet(${at('parts/*/*.parquet')}, hive_partitioning = true) WHERE part = 3`), [String(rows / 8)])
  // A join of one format with another.
  assert.deepStrictEqual(await one(c, `SELECT count(*) FROM read_parquet(${at('t.parquet')}) p JOIN read_csv(${at('t.csv')}) c ON p.id = c.id WHERE p.cents = c.cents`), [want[0]])
}

async function main () {
  const config = { threads: '4', autoinstall_known_extensions: 'false', autoload_known_extensions: 'false' }
  const memory = await DuckDBInstance.create(':memory:', config)
  const c = await memory.connect()
  if (what === 'write') {
    fs.mkdirSync(dir, { recursive: true })
    await write(c)
  }
  await read(c)
  c.closeSync()
  memory.closeSync()
  const file = path.join(dir, 'own.duckdb')
  if (what === 'write') {
    // A database of its own: locks, a write-ahead log, checkpoints, and a transaction that is taken back.
    const own = await DuckDBInstance.create(file, config)
    const d = await own.connect()
    await d.run('CREATE TABLE n (i BIGINT PRIMARY KEY, t VARCHAR)')
    for (let i = 0; i < 20; i++) await d.run(`INSERT INTO n SELECT ${i} * 1000 + r.i, repeat('x', 100) FROM range(1000) r(i)`)
    await d.run('CHECKPOINT')
    await d.run('BEGIN')
    await d.run('DELETE FROM n')
    await d.run('ROLLBACK')
    await d.run('UPDATE n SET t = \'changed\' WHERE i % 2 = 0')
    d.closeSync()
    own.closeSync()
  }
  const again = await DuckDBInstance.create(file, { ...config, access_mode: 'READ_ONLY' })
  const d = await again.connect()
  assert.deepStrictEqual(await one(d, 'SELECT count(*), sum(i), count(*) FILTER (t = \'changed\') FROM n'), ['20000', '199990000', '10000'])
  d.closeSync()
  again.closeSync()
  console.log('ok')
}

main().catch((err) => { console.error(err); process.exit(1) })
