// Package python holds what agentd brings into Python kernels: the module postern,
// with %%sql, on nothing but Python's standard library. numpy, pandas and pyarrow are
// used where they are installed.
package python
