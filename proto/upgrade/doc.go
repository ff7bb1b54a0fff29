// Package upgrade turns one HTTP/1.1 request inside the tunnel into a stream of
// frames in both directions: a POST whose body is a message, answered by 101 or by an
// error of ours. The packages that say what the frames are (wirestream,
// kernelstream) use it, with a Kind each.
//
// The control plane dials, the host reads the request, may refuse it as any other
// request, and accepts. A stream belongs to who got it, who closes it.
package upgrade
