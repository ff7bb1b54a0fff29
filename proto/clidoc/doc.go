// Package clidoc is what the three commands share to document themselves: a hidden
// command `man DIR` that writes their manual pages, which the packages ship.
package clidoc
