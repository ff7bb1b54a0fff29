// Package kernelstream carries a kernel's messages between the control plane,
// where Jupyter's clients connect, and the host, where the kernel runs; between
// agentd and the kernel's shim it is the same.
//
//	control plane                                   host
//	POST /postern/v1/kernel-channels, Upgrade ───▶  policy, audit, the kernel's shim
//	                                          ◀───  101 (or a status and an ErrorDetail)
//	                                          ◀───  attached
//	send, confirm                             ───▶
//	                                          ◀───  taken, delivery, changed, ...
//	                                          ◀───  end
//
// A frame is
//
//	length  4 bytes, big-endian, of the payload alone, at most MaxFrame
//	payload posternv1.KernelFrame
//
// Every message of the kernel has a sequence number and lies in a journal on the
// host before it is delivered. A client says with confirm what has arrived where
// it belongs; when its stream is lost it comes back with KernelChannelsRequest.resume
// and gets, in order and once, what it had not confirmed. What the journal had to
// drop meanwhile is told by a delivery with truncated_from.
//
// The other way the host says with taken how many of the client's messages lie with the
// shim; the others are sent again on the next stream, and what came twice is dropped by
// its msg_id.
//
// There is no half-close: either side ends the stream by closing it; the host sends
// end first, if it can (see End). A stream that ends without it means that the host
// was lost. The stream's own back-pressure is the only flow control: a client that
// does not read holds up nobody, its deliveries wait in the journal.
//
// A Reader holds one frame at most; a Writer may be used by several goroutines.
// Anyone may import this package.
package kernelstream
