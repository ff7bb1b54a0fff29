// Package nginxtest starts a real nginx that terminates TLS in front of a control
// plane, configured by the very file that docs/nginx.md tells operators to use:
// only addresses, the server's name and the certificate's paths are replaced. It
// has a throwaway CA and a directory of its own, and lives as long as the test.
package nginxtest
