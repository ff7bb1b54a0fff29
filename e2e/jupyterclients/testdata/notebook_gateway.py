# A notebook server with the agent as its kernel gateway, driven as a browser does.
import json, os, socket, subprocess, sys, time, uuid
import requests, websocket

s = socket.socket(); s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]; s.close()
log = open("notebook.log", "w")
server = subprocess.Popen(
    [sys.executable, "-m", "notebook", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=%d" % port, "--port-retries=0",
     "--NotebookApp.token=lab", "--gateway-url=" + os.environ["BASE"], "--GatewayClient.auth_token=" + os.environ["POSTERN_TOKEN"]],
    stdout=log, stderr=log)
try:
    base, head = "http://127.0.0.1:%d" % port, {"Authorization": "token lab"}
    for i in range(300):
        try:
            if requests.get(base + "/api", headers=head, timeout=5).ok: break
        except requests.ConnectionError: pass
        assert server.poll() is None, open("notebook.log").read()
        time.sleep(0.1)

    def call(method, path, want, **more):
        r = requests.request(method, base + path, headers=head, timeout=60, **more)
        assert r.status_code == want, (method, path, r.status_code, r.text, open("notebook.log").read()[-4000:])
        return r.json() if r.text else None

    specs = call("GET", "/api/kernelspecs", 200)
    assert "python3" in specs["kernelspecs"], specs
    call("PUT", "/api/contents/a.ipynb", 201, json={"type": "notebook", "content": {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}})
    session = call("POST", "/api/sessions", 201, json={"path": "a.ipynb", "type": "notebook", "name": "a", "kernel": {"name": "python3"}})
    k = session["kernel"]["id"]
    sid = uuid.uuid4().hex
    ws = websocket.create_connection("ws://127.0.0.1:%d/api/kernels/%s/channels?session_id=%s" % (port, k, sid), header=["Authorization: token lab"], timeout=60)

    def run(code, interrupt=False):
        id = uuid.uuid4().hex
        ws.send(json.dumps({"channel": "shell", "parent_header": {}, "metadata": {},
            "header": {"msg_id": id, "session": sid, "username": "u", "date": "2026-11-22T00:00:00Z", "msg_type": "execute_request", "version": "5.3"},
            "content": {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False, "stop_on_error": False}}))
        all, idle, reply = [], False, False
        while not (idle and reply):
            m = json.loads(ws.recv())
            if m["parent_header"].get("msg_id") != id: continue
            all.append(m)
            reply = reply or m["channel"] == "shell"
            if m["msg_type"] == "status":
                idle = idle or m["content"]["execution_state"] == "idle"
            if interrupt and m["msg_type"] == "execute_input":
                time.sleep(0.3); call("POST", "/api/kernels/%s/interrupt" % k, 204)
        return all

    got = run("import os; x = 5; print('through the gateway')")
    assert [m for m in got if m["msg_type"] == "stream"][0]["content"]["text"] == "through the gateway\n", got
    got = run("import time; time.sleep(60)", interrupt=True)
    assert [m for m in got if m["msg_type"] == "error"][0]["content"]["ename"] == "KeyboardInterrupt", got
    call("POST", "/api/kernels/%s/restart" % k, 200)
    ws.close()
    ws = websocket.create_connection("ws://127.0.0.1:%d/api/kernels/%s/channels?session_id=%s" % (port, k, sid), header=["Authorization: token lab"], timeout=60)
    got = run("x")
    assert [m for m in got if m["msg_type"] == "error"][0]["content"]["ename"] == "NameError", got
    call("DELETE", "/api/sessions/" + session["id"], 204)
    ws.close()
    print("done")
finally:
    server.terminate()
    server.wait(20)
