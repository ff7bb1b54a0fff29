"""What _secrets does to os.environ; run by TestSecrets, without a kernel."""

import os
import socket
import struct
import sys
import tempfile
import threading

from postern import _secrets as S

path = os.path.join(tempfile.mkdtemp(), "s")


def give(raw=None, **values):
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    text = b""
    for name, value in values.items():
        value = value.encode("utf-8")
        text += struct.pack(">H", len(name)) + name.encode() + struct.pack(">I", len(value)) + value
    text = struct.pack(">I", len(text)) + text if raw is None else raw

    def serve():
        conn, _ = listener.accept()
        for i in range(0, len(text), 7):  # in pieces
            conn.sendall(text[i : i + 7])
        conn.close()
        listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    answer = S._answer({"op": "fetch", "path": path})
    thread.join()
    return answer


def check(what, got, want):
    if got != want:
        sys.exit("%s: got %r, want %r" % (what, got, want))


OK = {"status": "ok"}
os.environ["SHADOWED"] = "was there"
check("given", give(A="value of a", B="wert ä€\U0001f600", SHADOWED="secret now"), OK)
check("read", (os.environ["A"], os.environ.get("B"), os.environb[b"A"], os.environ["SHADOWED"]), ("value of a", "wert ä€\U0001f600", b"value of a", "secret now"))
check("one str", os.environ["A"] is os.environ["A"], True)
check("others", os.environ["PATH"] == os.environ["PATH"] and "A" in os.environ and len(dict(os.environ)) == len(os.environ), True)
check("in C", os.popen("echo [$A] [$SHADOWED]").read(), "[] [was there]\n")
text = os.environ["A"]
check("the same again", (give(A="value of a", B="wert ä€\U0001f600", SHADOWED="secret now"), os.environ["A"] is text), (OK, True))
del text
check("rotated", (give(A="another value", SHADOWED="secret now"), os.environ["A"], "B" in os.environ), (OK, "another value", False))
mine = os.environ["A"]
check("erased", S._answer({"op": "erase"}), {"status": "ok", "kept": ["A"]})
check("after it", ("A" in os.environ, mine, os.environ["SHADOWED"]), (False, "another value", "was there"))
check("erased twice", S._answer({"op": "erase"}), {"status": "ok", "kept": []})
check("back", (give(A="another value"), os.environ["A"]), (OK, "another value"))
os.environ["A"] = "the user's own"
check("the user's own stays", (S._answer({"op": "erase"})["status"], os.environ["A"]), ("ok", "the user's own"))
check("and is replaced", (give(A="a third value"), os.environ["A"], give(), os.environ["A"]), (OK, "a third value", OK, "the user's own"))
del os.environ["A"]
check("deleted", (give(A="a third value"), os.environ.pop("A"), S._answer({"op": "erase"})["status"]), (OK, "a third value", "ok"))

# What goes wrong is told without a value.
for what, answer in {
    "cut short": give(raw=struct.pack(">I", 99) + b"\0\1Asecret value"),
    "too much": give(raw=struct.pack(">I", 1 << 30)),
    "no number": give(raw=struct.pack(">I", 3) + b"\0\1A"),
    "nobody": S._answer({"op": "fetch", "path": path + "x"}),
    "no path": S._answer({"op": "fetch"}),
    "unknown": S._answer({"op": "x"}),
    "empty": S._answer({}),
}.items():
    check(what, answer["status"], "error")
    check(what, "secret value" in answer["reason"], False)

# A child that is forked has none.
class Kernel:
    control_handlers = {}


class Shell:
    kernel = Kernel


S.register(Shell)
check("registered", list(Kernel.control_handlers), ["postern_secrets_request"])
check("given", give(A="value of a"), OK)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b"yes" if "A" in os.environ else b"no")
    os._exit(0)
os.waitpid(child, 0)
check("in a child", (os.read(read, 9), os.environ["A"]), (b"no", "value of a"))
print("done")
