// Package mariadbserver starts throwaway MariaDB servers for tests, and MySQL servers
// where packaging/dev/mysql.sh has fetched one.
//
// A server listens on a free loopback port and on a unix socket, keeps its data in a
// temporary directory without fsync, and runs as the user mysql when we are root, else
// as ourselves. [Launch] needs no test; [Start] ties the server to one. Any package's
// tests may import it. All methods may be called from several goroutines, except that
// Stop, Down, Kill and Restart exclude each other.
package mariadbserver
