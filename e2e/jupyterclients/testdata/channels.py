# What clients do on the wire: two of them, stdin both ways, buffers, interrupts while the
# kernel prints, restart, death, stop; and 100,000 lines.
import json, os, threading, time, uuid
import requests, websocket

base, token = os.environ["BASE"], os.environ["POSTERN_TOKEN"]
head = {"Authorization": "token " + token}


def call(method, path, want, **more):
    r = requests.request(method, base + path, headers=head, timeout=60, **more)
    assert r.status_code == want, (method, path, r.status_code, r.text)
    return r.json() if r.text else None


class Client:
    def __init__(self, kernel, session=None):
        self.session = session or uuid.uuid4().hex
        self.ws = websocket.create_connection(
            base.replace("http", "ws", 1) + "/api/kernels/%s/channels?session_id=%s" % (kernel, self.session), header=["Authorization: token " + token], timeout=60)

    def send(self, channel, kind, content, parent={}):
        h = {"msg_id": uuid.uuid4().hex, "session": self.session, "username": "u", "date": "2026-11-22T00:00:00Z", "msg_type": kind, "version": "5.3"}
        self.ws.send(json.dumps({"channel": channel, "header": h, "parent_header": parent, "metadata": {}, "content": content}))
        return h["msg_id"]

    def execute(self, code, stdin=False):
        return self.send("shell", "execute_request", {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": stdin, "stop_on_error": False})

    def recv(self):
        data = self.ws.recv()
        if isinstance(data, bytes):
            n = int.from_bytes(data[:4], "big")
            at = [int.from_bytes(data[4 + 4 * i:8 + 4 * i], "big") for i in range(n)] + [len(data)]
            m = json.loads(data[at[0]:at[1]])
            m["buffers"] = [data[at[i]:at[i + 1]] for i in range(1, n)]
            return m
        return json.loads(data)

    def until(self, id, reply=True):
        all, idle, replied = [], False, not reply
        while not (idle and replied):
            m = self.recv()
            all.append(m)
            if m["parent_header"].get("msg_id") == id:
                replied = replied or m["channel"] == "shell"
                idle = idle or m["msg_type"] == "status" and m["content"]["execution_state"] == "idle"
        return all

    def run(self, code):
        return self.until(self.execute(code))


def text(messages):
    return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")


specs = call("GET", "/api/kernelspecs", 200)
assert specs["default"] in specs["kernelspecs"], specs
k = call("POST", "/api/kernels", 201, json={"name": specs["default"]})["id"]
a = Client(k)
a.until(a.send("shell", "kernel_info_request", {}))
got = a.run("print('hello'); 6*7")
assert text(got) == "hello\n", got
# In order within a channel: between the reply and what is published there is none.
kinds = [m["msg_type"] for m in got if m["channel"] == "iopub" and m["parent_header"].get("msg_type") == "execute_request"]
assert kinds[0] == "status" and "execute_input" in kinds and kinds.index("stream") < kinds.index("execute_result"), kinds

# Two clients: output for both, the reply for who asked.
b = Client(k)
id = a.execute("x = 1; print('both')")
assert text(a.until(id)) == text(b.until(id, reply=False)) == "both\n"

# Standard input.
id = a.execute("print('got', input('name? '))", stdin=True)
while True:
    m = a.recv()
    if m["msg_type"] == "input_request":
        assert m["content"]["prompt"] == "name? " and m["channel"] == "stdin", m
        a.send("stdin", "input_reply", {"value": "Ana"}, m["header"])
        break
assert text(a.until(id)) == "got Ana\n"

# Binary buffers.
got = a.run("""from IPython import get_ipython
s = get_ipython().kernel.session
s.send(get_ipython().kernel.iopub_socket, 'display_data', {'data': {'text/plain': 'b'}, 'metadata': {}}, parent=get_ipython().parent_header, buffers=[b'\\x00\\x01', b'\\xff' * 100000])""")
found = [m for m in got if m.get("buffers")]
assert found and [bytes(x) for x in found[0]["buffers"]] == [b"\x00\x01", b"\xff" * 100000], got

# Interrupt while it prints at full speed; the request does not wait behind the output.
id = a.execute("while True: print('x' * 200)")
while a.recv()["msg_type"] != "stream": pass
took = []
def interrupt():
    began = time.monotonic(); call("POST", "/api/kernels/%s/interrupt" % k, 204); took.append(time.monotonic() - began)
t = threading.Thread(target=interrupt); t.start()
got = a.until(id)
t.join()
assert [m for m in got if m["msg_type"] == "error"][0]["content"]["ename"] == "KeyboardInterrupt"
b.ws.close()

# A hundred thousand lines, each once, in order.
began = time.monotonic()
lines = text(a.run("for i in range(100000): print(i)")).split("\n")
assert lines[:-1] == [str(i) for i in range(100000)], (len(lines), lines[:3], lines[-3:])
print("100,000 lines in %.2f s, interrupt answered in %.0f ms" % (time.monotonic() - began, took[0] * 1000))

# Restart on the same WebSocket, and on a new one.
call("POST", "/api/kernels/%s/restart" % k, 200)
assert "NameError" in json.dumps(a.run("x"))
b = Client(k)
assert text(b.run("print('new')")) == "new\n"
b.ws.close()

# Who comes back under its session_id gets what it missed, once.
b = Client(k, "session-b")
b.run("1")
b.ws.close()
id = a.execute("for i in range(2000): print('missed', i)")
a.until(id)
b = Client(k, "session-b")
got = b.until(id, reply=False)
assert text(got) == "".join("missed %d\n" % i for i in range(2000)), text(got)[:100]
ids = [m["header"]["msg_id"] for m in got]
assert len(ids) == len(set(ids))
b.ws.close()

# Round trips.
times = []
for i in range(60):
    began = time.monotonic(); a.run("1"); times.append(time.monotonic() - began)
times.sort()
print("execute round trip %.1f ms median" % (times[30] * 1000))

call("GET", "/api/kernels/" + k, 200)
assert [m for m in call("GET", "/api/kernels", 200) if m["id"] == k]
call("DELETE", "/api/kernels/" + k, 204)
call("GET", "/api/kernels/" + k, 404)
print("done")
