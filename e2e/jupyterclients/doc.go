// Package jupyterclients runs Jupyter's own clients, as Debian packages them, against an
// agent of a control plane: jupyter_kernel_test through `postern kernel bridge`, nbclient
// and `jupyter notebook` through jupyter_server's gateway client, and scripts with
// jupyter_client and websocket-client. The same tests run with real kernels behind a
// simulated manager (controlplane) and behind agentd (e2e).
package jupyterclients
