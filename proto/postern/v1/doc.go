// Package posternv1 holds the messages that cross a process boundary in
// version 1 of Postern's protocol. Everything but this file is generated from
// the .proto files beside it (make proto); the Connect clients and handlers are
// in the package posternv1connect beneath. Anybody may import it.
package posternv1
