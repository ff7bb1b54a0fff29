// Package identity keeps what makes a host this agent: a key pair that was made
// here and never leaves, its certificate, and the authorities to trust. On disk,
// below the agent's state directory:
//
//	identity/              0700
//	  agent.json           agent_id, name, organization, url
//	  key.pem              0600, ECDSA P-256, PKCS #8
//	  cert.pem             the certificate for key.pem
//	  authorities.pem      every CA to trust; nothing else is trusted
//	  next-key.pem         while a renewal is under way: the next pair
//	  next-cert.pem
//
// A renewal makes the next pair, tries it by opening a tunnel with it (the other
// side retires the old certificate at that moment) and then promotes it. After a
// crash at any step Open finds a pair that works: a complete next pair is tried
// before the current one, because the control plane may have seen it already.
//
// The package does no network I/O. An Identity may be used from several
// goroutines; one process at a time may hold an identity directory open.
package identity
