# nbclient with jupyter_server's gateway client, which sends no token with its
# WebSocket: the token is in the path.
import os
import nbformat, nbclient
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager

GatewayClient.instance().url = os.environ["BASE"] + "/t/" + os.environ["POSTERN_TOKEN"]
nb = nbformat.v4.new_notebook(cells=[
    nbformat.v4.new_code_cell("x = 6*7\nprint('on the host')\nx"),
    nbformat.v4.new_code_cell("import sys; print('careful', file=sys.stderr)"),
    nbformat.v4.new_code_cell("from IPython.display import HTML; HTML('<b>' + str(x) + '</b>')"),
    nbformat.v4.new_code_cell("for i in range(3000): print(i)"),
])
client = nbclient.NotebookClient(nb, timeout=120, kernel_name="python3", kernel_manager_class=GatewayKernelManager)
client.execute()
out = [c["outputs"] for c in nb.cells]
assert out[0][0]["text"] == "on the host\n" and out[0][1]["data"]["text/plain"] == "42", out[0]
assert out[1][0]["name"] == "stderr", out[1]
assert out[2][0]["data"]["text/html"] == "<b>42</b>", out[2]
assert "".join(o["text"] for o in out[3]) == "".join("%d\n" % i for i in range(3000))
bad = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1/0"), nbformat.v4.new_code_cell("2")])
try:
    nbclient.NotebookClient(bad, timeout=120, kernel_name="python3", kernel_manager_class=GatewayKernelManager).execute()
    raise SystemExit("a failing cell did not fail")
except nbclient.exceptions.CellExecutionError as e:
    assert "ZeroDivisionError" in str(e)
print("done")
