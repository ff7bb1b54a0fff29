// node-postgres against a read-only data source of Postern. Ends with "ok".
const assert = require('assert')
const fs = require('fs')
const { Client, Pool } = require('pg')
const Cursor = require('pg-cursor')

const config = {
  host: process.env.PGHOST, port: +process.env.PGPORT, user: process.env.PGUSER, password: process.env.PGPASSWORD,
  database: process.env.PGDATABASE, ssl: { ca: fs.readFileSync(process.env.PGSSLROOTCERT, 'utf8') }, statement_timeout: 60000,
}

async function refused (code, promise, what) {
  await assert.rejects(promise, (e) => { assert.strictEqual(e.code, code, `${what}: ${e.message}`); return true })
}

async function main () {
  const c = new Client(config)
  await c.connect()
  const r = await c.query("select 1 as a, 'x' as b, null as c, 2.5::numeric as d, '{1,2}'::int[] as e, '{\"k\":1}'::jsonb as f")
  assert.deepStrictEqual(r.rows, [{ a: 1, b: 'x', c: null, d: '2.5', e: [1, 2], f: { k: 1 } }])
  for (let i = 0; i < 5; i++) {
    const named = await c.query({ name: 'by-id', text: 'select name from customers where id = $1', values: [i + 1] })
    assert.strictEqual(named.rows[0].name, `customer ${i + 1}`)
  }
  const many = await c.query('select 1 as a; select 2 as a')
  assert.deepStrictEqual(many.map((one) => one.rows[0].a), [1, 2])
  const cursor = c.query(new Cursor('select id from orders order by id'))
  let n = 0
  for (let rows = await cursor.read(700); rows.length > 0; rows = await cursor.read(700)) n += rows.length
  await cursor.close()
  assert.strictEqual(n, 5000)
  await refused('25006', c.query('delete from orders'), 'delete')
  await refused('25006', c.query('delete from orders where id = $1', [1]), 'delete with a parameter')
  await c.query('begin')
  await refused('42P01', c.query('select * from nowhere'), 'an unknown table')
  await refused('25P02', c.query('select 1'), 'a failed transaction')
  await c.query('rollback')
  assert.strictEqual((await c.query('select count(*)::int as n from orders')).rows[0].n, 5000)
  await c.end()
  const pool = new Pool({ ...config, max: 4 })
  const all = await Promise.all([...Array(40).keys()].map((i) => pool.query('select $1::int as n', [i])))
  assert.deepStrictEqual(all.map((one) => one.rows[0].n), [...Array(40).keys()])
  await pool.end()
  console.log('ok')
}

main().catch((e) => { console.error(e); process.exit(1) })
