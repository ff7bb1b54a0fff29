// Package secret reads the credentials of data sources on the host.
//
// A [Secret] is a value that prints as "redacted" wherever it is printed. A
// [Ref] says where one comes from: a file, agentd's environment or a systemd
// credential. [Ref.Load] reads afresh each time, so a rotated password needs
// no restart; only environment variables are read once, by [CaptureEnv], which
// then wipes them from the process's environment so that /proc/PID/environ
// and child processes don't show them.
//
// Nothing here logs, and no error text holds a secret. Everything is safe for
// concurrent use except CaptureEnv, which belongs at the start of main.
package secret
