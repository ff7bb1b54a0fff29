// The client library of JupyterLab, which VS Code's Jupyter extension uses as well,
// against an agent's kernels. BASE is https://.../jupyter/AGENT, TOKEN an API token, or empty
// where BASE has it.
// Ends with "ok".
const assert = require('assert')
const WebSocket = require('ws')
const { ServerConnection, KernelManager, KernelSpecManager, SessionManager, KernelMessage, KernelAPI } = require('@jupyterlab/services')

const base = process.env.BASE + '/'
const sockets = []

// Socket is WebSocket that the script can break.
class Socket extends WebSocket {
  constructor (...args) {
    super(...args)
    sockets.push(this)
  }
}

const settings = ServerConnection.makeSettings({
  baseUrl: base, wsUrl: base.replace(/^http/, 'ws'), token: process.env.TOKEN, WebSocket: Socket, init: { cache: 'no-store' }
})

const patience = 120_000

// within fails when a promise takes too long.
async function within (promise, what) {
  let timer
  const late = new Promise((resolve, reject) => { timer = setTimeout(() => reject(new Error('too late: ' + what)), patience) })
  try {
    return await Promise.race([promise, late])
  } finally { clearTimeout(timer) }
}

async function until (condition, what) {
  const end = Date.now() + patience
  while (!(await condition())) {
    assert(Date.now() < end, 'too late: ' + what)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

// run executes code and returns all that came of it.
async function run (kernel, code, options = {}, stdin) {
  const got = { text: '', errors: '', messages: [] }
  const future = kernel.requestExecute({ code, allow_stdin: !!stdin, ...options })
  future.onIOPub = (m) => {
    got.messages.push(m)
    if (m.header.msg_type === 'stream') got[m.content.name === 'stdout' ? 'text' : 'errors'] += m.content.text
  }
  if (stdin) future.onStdin = (m) => stdin(m, future)
  got.reply = await within(future.done, code)
  got.of = (type) => got.messages.filter((m) => m.header.msg_type === type).map((m) => m.content)
  return got
}

async function specs () {
  const manager = new KernelSpecManager({ serverSettings: settings })
  await within(manager.ready, 'kernelspecs')
  assert.strictEqual(manager.specs.default, 'python3')
  assert.strictEqual(manager.specs.kernelspecs.python3.language, 'python')
  await manager.refreshSpecs()
  manager.dispose()
}

async function executes (kernel) {
  const info = await within(kernel.info, 'kernel_info')
  assert.strictEqual(info.language_info.name, 'python')
  let r = await run(kernel, "print('größe 😀'); import sys; print('bad', file=sys.stderr); 6 * 7")
  assert.strictEqual(r.text, 'größe 😀\n')
  assert.strictEqual(r.errors, 'bad\n')
  assert.strictEqual(r.of('execute_result')[0].data['text/plain'], '42')
  assert.strictEqual(r.reply.content.status, 'ok')
  assert.strictEqual(r.of('status').at(-1).execution_state, 'idle')
  assert.strictEqual(r.of('execute_input').length, 1)
  r = await run(kernel, "from IPython.display import display, HTML\nh = display(HTML('<b>1</b>'), display_id='d')\nh.update(HTML('<b>2</b>'))")
  assert.deepStrictEqual([r.of('display_data')[0].data['text/html'], r.of('update_display_data')[0].data['text/html']], ['<b>1</b>', '<b>2</b>'])
  r = await run(kernel, '1/0')
  assert.strictEqual(r.reply.content.ename, 'ZeroDivisionError')
  assert.strictEqual(r.of('error')[0].ename, 'ZeroDivisionError')
  r = await run(kernel, 'x = 5', { user_expressions: { y: 'x + 1' }, store_history: true })
  assert.strictEqual(r.reply.content.user_expressions.y.data['text/plain'], '6')
  const complete = await within(kernel.requestComplete({ code: 'import numb', cursor_pos: 11 }), 'complete')
  assert(complete.content.matches.some((m) => m.includes('numbers')), JSON.stringify(complete.content))
  const inspect = await within(kernel.requestInspect({ code: 'len', cursor_pos: 3, detail_level: 0 }), 'inspect')
  assert.strictEqual(inspect.content.found, true)
  assert.strictEqual((await within(kernel.requestIsComplete({ code: 'for i in x:' }), 'is_complete')).content.status, 'incomplete')
  const history = await within(kernel.requestHistory({ hist_access_type: 'tail', n: 1, output: false, raw: true }), 'history')
  assert.strictEqual(history.content.history.at(-1)[2], 'x = 5')
  // A queue of cells: what stands behind an error is aborted.
  const failed = kernel.requestExecute({ code: 'raise ValueError(1)', stop_on_error: true })
  const behind = kernel.requestExecute({ code: 'y = 1' })
  assert.strictEqual((await within(failed.done, 'the error')).content.status, 'error')
  assert(['aborted', 'error', 'ok'].includes((await within(behind.done, 'what is behind it')).content.status))
}

async function asks (kernel) {
  const r = await run(kernel, "n = input('name? ')\nimport getpass\np = getpass.getpass('word? ')\nprint(n, len(p))", {}, (m, future) => {
    assert.strictEqual(m.header.msg_type, 'input_request')
    kernel.sendInputReply({ status: 'ok', value: m.content.password ? 'secret' : 'ana' }, m.header)
  })
  assert.strictEqual(r.text, 'ana 6\n')
}

async function interrupts (kernel) {
  let began
  const started = new Promise((resolve) => { began = resolve })
  const future = kernel.requestExecute({ code: "import time\nprint('go', flush=True)\nwhile True: time.sleep(0.01)" })
  let ename
  future.onIOPub = (m) => {
    if (m.header.msg_type === 'stream') began()
    if (m.header.msg_type === 'error') ename = m.content.ename
  }
  await within(started, 'the loop')
  await within(kernel.interrupt(), 'interrupt')
  assert.strictEqual((await within(future.done, 'the interrupted cell')).content.status, 'error')
  assert.strictEqual(ename, 'KeyboardInterrupt')
}

async function restarts (kernel) {
  await run(kernel, 'kept = 1')
  const seen = []
  const note = (_, status) => seen.push(status)
  kernel.statusChanged.connect(note)
  await within(kernel.restart(), 'restart')
  kernel.statusChanged.disconnect(note)
  assert(seen.includes('restarting') || seen.includes('autorestarting'), seen.join())
  const r = await run(kernel, "'kept' in globals()")
  assert.strictEqual(r.of('execute_result')[0].data['text/plain'], 'False')
}

async function comms (kernel) {
  await run(kernel, `
from ipykernel.comm import Comm
def target(comm, msg):
    comm.send({'hello': msg['content']['data']}, buffers=[bytes(range(256))])
    @comm.on_msg
    def _(m): comm.send({'echo': m['content']['data']}, buffers=m['buffers'])
get_ipython().kernel.comm_manager.register_target('t', target)`)
  const comm = kernel.createComm('t')
  const got = []
  comm.onMsg = (m) => { got.push(m) }
  await within(comm.open({ a: 1 }).done, 'comm_open')
  await until(() => got.length === 1, 'the first message')
  assert.deepStrictEqual(got[0].content.data, { hello: { a: 1 } })
  assert.deepStrictEqual([...new Uint8Array(got[0].buffers[0].buffer ?? got[0].buffers[0])].slice(-2), [254, 255])
  const bytes = new Uint8Array(100_000).fill(7)
  await within(comm.send({ b: 2 }, undefined, [bytes.buffer]).done, 'comm_msg')
  await until(() => got.length === 2, 'the echo')
  assert.strictEqual(got[1].buffers[0].byteLength, 100_000)
  // The kernel opens one, as widgets do.
  let opened
  const theirs = new Promise((resolve) => { opened = resolve })
  kernel.registerCommTarget('u', (c, m) => { c.onMsg = (n) => opened([m.content.data, n.content.data]) })
  await run(kernel, "c = Comm(target_name='u', data={'x': 1})\nc.send({'y': 2})")
  assert.deepStrictEqual(await within(theirs, "the kernel's comm"), [{ x: 1 }, { y: 2 }])
  await within(comm.close().done, 'comm_close')
  const known = await within(kernel.requestCommInfo({ target_name: 'u' }), 'comm_info')
  assert.strictEqual(Object.keys(known.content.comms).length, 1)
}

// reconnects breaks the connection while a cell prints: every line comes, once, in order.
async function reconnects (kernel) {
  const n = 3000
  let text = ''
  const future = kernel.requestExecute({ code: `import time\nfor i in range(${n}):\n  print(i)\n  if i % 50 == 0: time.sleep(0.02)` })
  let broken = 0
  future.onIOPub = (m) => {
    if (m.header.msg_type !== 'stream') return
    text += m.content.text
    const length = text.length
    if ((broken === 0 && length > 1000) || (broken === 1 && length > 6000)) {
      broken++
      sockets.at(-1).terminate() // as a network that goes away
    }
  }
  assert.strictEqual((await within(future.done, 'the cell')).content.status, 'ok')
  assert.strictEqual(broken, 2)
  // What was read within the last round trip can come again (docs/jupyter.md): after each
  // break some lines are repeated, and none is missing.
  const lines = text.trimEnd().split('\n').map(Number)
  let next = 0
  let repeated = 0
  for (const line of lines) {
    assert(line <= next, `line ${next} is missing before ${line}`)
    if (line < next) repeated++
    next = Math.max(next, line + 1)
  }
  console.log('repeated', repeated, 'of', lines.length)
  assert.strictEqual(next, n)
  // And in order, as when a laptop opens again.
  await within(kernel.reconnect(), 'reconnect')
  assert.strictEqual((await run(kernel, 'print(1)')).text, '1\n')
}

async function two (manager, kernel) {
  const other = manager.connectTo({ model: kernel.model })
  assert.notStrictEqual(other.clientId, kernel.clientId)
  await within(other.info, "the other client's kernel_info")
  const seen = []
  other.anyMessage.connect((_, { msg, direction }) => { if (direction === 'recv' && KernelMessage.isStreamMsg(msg)) seen.push(msg.content.text) })
  const r = await run(kernel, "print('for both')")
  assert.strictEqual(r.text, 'for both\n')
  await until(() => seen.join('') === 'for both\n', "the other's copy")
  // A question goes to the one who asked alone.
  let asked = 0
  const others = other.requestExecute({ code: '1', allow_stdin: true })
  others.onStdin = () => { asked++ }
  await within(others.done, "the other's cell")
  await asks(kernel)
  assert.strictEqual(asked, 0)
  const both = await Promise.all([run(kernel, "print('a')"), run(other, "print('b')")])
  assert.deepStrictEqual(both.map((b) => b.text), ['a\n', 'b\n'])
  other.dispose()
  assert.strictEqual((await run(kernel, 'print(2)')).text, '2\n')
}

async function sessions (kernels) {
  const manager = new SessionManager({ kernelManager: kernels, serverSettings: settings })
  await within(manager.ready, 'sessions')
  const session = await within(manager.startNew({ path: 'work/größe 1.ipynb', name: 'größe 1.ipynb', type: 'notebook', kernel: { name: 'python3' } }), 'a session')
  assert.strictEqual((await run(session.kernel, 'print(3)')).text, '3\n')
  await manager.refreshRunning()
  assert.deepStrictEqual([...manager.running()].map((s) => s.path), ['work/größe 1.ipynb'])
  assert.strictEqual((await manager.findByPath('work/größe 1.ipynb')).id, session.id)
  await within(session.setPath('work/other.ipynb'), 'a new path')
  await within(session.setName('other.ipynb'), 'a new name')
  await manager.refreshRunning() // what findById tells is of the last poll
  const found = await manager.findById(session.id)
  assert.deepStrictEqual([found.path, found.name], ['work/other.ipynb', 'other.ipynb'])
  // The same path again is the same session, as when the browser is loaded again.
  const again = manager.connectTo({ model: await manager.findById(session.id) })
  assert.strictEqual((await run(again.kernel, 'print(4)')).text, '4\n')
  again.dispose()
  const before = session.kernel.id
  const kernel = await within(session.changeKernel({ name: 'python3' }), 'another kernel')
  assert.notStrictEqual(kernel.id, before)
  assert.strictEqual((await run(kernel, 'print(5)')).text, '5\n')
  await within(session.shutdown(), 'the end')
  await manager.refreshRunning()
  assert.deepStrictEqual([...manager.running()], [])
  await assert.rejects(async () => { const s = await manager.findById('nothing'); if (s === undefined) throw new Error('none') })
  manager.dispose()
}

async function main () {
  await specs()
  const manager = new KernelManager({ serverSettings: settings })
  await within(manager.ready, 'kernels')
  const kernel = await within(manager.startNew({ name: 'python3' }), 'a kernel')
  for (const [name, f] of Object.entries({ executes, asks, interrupts, restarts, comms, reconnects })) {
    await f(kernel)
    console.log(name)
  }
  await two(manager, kernel)
  console.log('two')
  await manager.refreshRunning()
  assert.deepStrictEqual([...manager.running()].map((k) => k.id), [kernel.id])
  await within(kernel.shutdown(), 'the end of the kernel')
  await manager.refreshRunning()
  assert.deepStrictEqual([...manager.running()], [])
  await sessions(manager)
  console.log('sessions')
  await assert.rejects(manager.startNew({ name: 'nothing' }), (e) => e instanceof ServerConnection.ResponseError && e.response.status >= 400 && !e.message.includes('\n'))
  // A token that is none is told as such.
  const nobody = ServerConnection.makeSettings({ baseUrl: base.replace(/\/t\/.*/, '/'), token: 'nothing' })
  await assert.rejects(KernelAPI.listRunning(nobody), (e) => e.response.status === 401 || e.response.status === 403)
  manager.dispose()
  console.log('ok')
  process.exit(0) // its polls go on else
}

main().catch((e) => { console.error(e); process.exit(1) })
