// Package lazy restores a tree whose memory comes when it is touched, and all of it within
// seconds: userfaultfd, with CRIU's `restore --lazy-pages`.
//
// The words: a space is the memory of one process, known by its userfaultfd; a range is
// memory of it that is missing, and where in the images it is. The server is a process of
// this same program ([Main]). It serves what is touched first and copies everything else
// meanwhile; then it lets go, and the tree is as after any other restore.
//
// What must never happen: Linux takes the close of the last descriptor of a userfaultfd for
// the end of it, and a page that is missing then reads as zeros. So
//
//   - whoever restores (a kernel's shim) holds a descriptor of each userfaultfd from
//     before CRIU lets a process go until the server is done;
//   - the server has a guard, a process that shares its table of descriptors (clone(2),
//     CLONE_FILES): what the server holds, those of forks too, stays open when it is killed.
//     The guard ends the tree then, and only when that is gone it lets go;
//   - the mark, a file that server and guard hold a lock of, says whether all came. Who
//     takes the tree over later ([Await]) knows by it what became of them.
//
// A server that died is not started again: what the processes unmapped, moved and forked
// since was known to it alone. The checkpoint is there still.
//
// The images are read, and were authenticated, before anything starts: nothing is verified
// while the tree runs. Their files are held open, so the directory may be removed.
//
// Only agentd/checkpoint imports it.
package lazy
