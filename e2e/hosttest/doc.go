// Package hosttest installs the packages on really booted Debian hosts and does
// to them what administrators and bad days do. Its tests have the build tag
// hosttest and are run by `make host-test`: they need root, mmdebstrap and
// systemd-container, which that installs, and a Debian mirror.
//
// POSTERN_SUITES names the Debian suites, by default "trixie bookworm";
// POSTERN_LONG=1 takes the full numbers of restarts.
package hosttest
