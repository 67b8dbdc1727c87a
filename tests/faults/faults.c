/* Faults on order, for a process that this library is preloaded into.

Events are counted below one folder: what opens a file for writing, writes, maps it for writing, syncs, renames, links,
removes, makes or truncates there. faults_arm() says what happens at the n-th of them. Until it is called, and outside of
the folder, every call does what it always did. Each call is made of the kernel itself, so nothing is looked up.

Out of reach: io_uring; system calls that a program makes by itself (Rust's rustix does: safetensors' rename); writes
through a map (the map itself is an event); and glibc's own buffered streams, which open and write inside of it (fopen
is an event; what fwrite writes is not). Linux on 64 bits. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL, SIGNAL }; /* see Fault in __init__.py */

static char root[PATH_MAX];
static size_t root_length; /* 0: not armed */
static int mode, number, record = -1; /* number: of an error or a signal */
static long at;
static atomic_long count;
static int failed;
static pid_t owner;

static void die(void) {
    syscall(SYS_kill, (pid_t)syscall(SYS_getpid), SIGKILL);
    for (;;) syscall(SYS_sched_yield);
}

/* The path of a descriptor. 0 where it isn't below the folder. */
static int of_descriptor(int fd, char *path) {
    char link[32];
    if (!root_length || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* The absolute path of a name. 0 where it isn't below the folder. */
static int of_name(int folder, const char *name, char *path) {
    if (!root_length || !name) return 0;
    if (name[0] == '/') {
        if (strlen(name) >= PATH_MAX) return 0;
        strcpy(path, name);
    } else {
        char link[32] = "/proc/self/cwd";
        if (folder != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
        if (n <= 0 || n + strlen(name) + 2 > PATH_MAX) return 0;
        path[n] = '/';
        strcpy(path + n + 1, name);
    }
    if (strstr(path, "/../")) {
        char folder[PATH_MAX], *end = strrchr(path, '/');
        *end = 0;
        if (!realpath(path, folder) || strlen(folder) + strlen(end + 1) + 2 > PATH_MAX) return 0;
        memmove(path + strlen(folder) + 1, end + 1, strlen(end + 1) + 1);
        memcpy(path, folder, strlen(folder));
        path[strlen(folder)] = '/';
    }
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* Count an event, note it, and return what is to happen: 0 what is asked for, or the mode where this is the event. */
static int event(const char *kind, const char *path, const char *to, size_t bytes) {
    if ((pid_t)syscall(SYS_getpid) != owner) return 0; /* a process that this one started */
    long n = ++count;
    if (record >= 0) {
        char line[3 * PATH_MAX];
        int length = snprintf(line, sizeof line, "%ld\t%s\t%zu\t%s\t%s\n", n, kind, bytes, path, to);
        syscall(SYS_write, record, line, (size_t)length);
    }
    if (mode == FULL) return at && n >= at ? FULL : 0;
    if (n != at) return 0;
    if (mode == KILL) die();
    if (mode == SIGNAL) syscall(SYS_tgkill, owner, owner, number); /* the main thread */
    return mode == TEAR ? TEAR : 0;
}

/* What a write may do: 0 all of it, or at most *size bytes; -1 and errno for none. */
static int allow_write(int what, size_t *size) {
    if (what == FULL) {
        if (failed++ || *size < 2) {
            errno = number;
            return -1;
        }
        *size /= 2; /* as a disk does it: what fits is written, and the next write fails */
    }
    if (what == TEAR) *size /= 2;
    return 0;
}

void faults_arm(const char *folder, int what, long when, int which, const char *log) {
    root_length = 0;
    if (!realpath(folder, root)) abort();
    mode = what;
    at = when;
    number = which;
    count = 0;
    failed = 0;
    owner = getpid();
    if (log && *log) {
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
        record = fcntl(fd, F_DUPFD_CLOEXEC, 700);
        syscall(SYS_close, fd);
    }
    root_length = strlen(root);
}

long faults_count(void) { return count; }

/* --- what makes room or takes none --------------------------------------------------------------------------------*/

#define AFTER(result)                                                                                                  \
    do {                                                                                                               \
        long _r = (result);                                                                                            \
        if (what == TEAR) die();                                                                                       \
        return _r;                                                                                                     \
    } while (0)

static int rename_(int a, const char *from, int b, const char *to, unsigned flags) {
    char path[PATH_MAX], path2[PATH_MAX];
    int below = of_name(a, from, path), below2 = of_name(b, to, path2);
    int what = below || below2 ? event("rename", path, path2, 0) : 0;
    AFTER(syscall(SYS_renameat2, a, from, b, to, flags));
}
int rename(const char *from, const char *to) { return rename_(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return rename_(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return rename_(a, from, b, to, flags); }

static int unlink_(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    int what = of_name(folder, name, path) ? event(flags ? "rmdir" : "unlink", path, "", 0) : 0;
    AFTER(syscall(SYS_unlinkat, folder, name, flags));
}
int unlink(const char *name) { return unlink_(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlink_(AT_FDCWD, name, AT_REMOVEDIR); }
int unlinkat(int folder, const char *name, int flags) { return unlink_(folder, name, flags); }
int remove(const char *name) {
    int r = unlink(name);
    return r && errno == EISDIR ? rmdir(name) : r;
}

static int sync_(int call, int fd) {
    char path[PATH_MAX];
    int what = of_descriptor(fd, path) ? event("sync", path, "", 0) : 0;
    AFTER(syscall(call, fd));
}
int fsync(int fd) { return sync_(SYS_fsync, fd); }
int fdatasync(int fd) { return sync_(SYS_fdatasync, fd); }

/* --- what takes room ----------------------------------------------------------------------------------------------*/

#define ROOM()                                                                                                         \
    if (what == FULL) {                                                                                                \
        failed++;                                                                                                      \
        errno = number;                                                                                                \
        return -1;                                                                                                     \
    }

static int mkdir_(int folder, const char *name, mode_t rights) {
    char path[PATH_MAX];
    int what = of_name(folder, name, path) ? event("mkdir", path, "", 0) : 0;
    ROOM();
    AFTER(syscall(SYS_mkdirat, folder, name, rights));
}
int mkdir(const char *name, mode_t rights) { return mkdir_(AT_FDCWD, name, rights); }
int mkdirat(int folder, const char *name, mode_t rights) { return mkdir_(folder, name, rights); }

static int link_(const char *kind, int a, const char *from, int b, const char *to, int flags) {
    char path[PATH_MAX];
    int what = of_name(b, to, path) ? event(kind, from, path, 0) : 0;
    ROOM();
    AFTER(*kind == 's' ? syscall(SYS_symlinkat, from, b, to) : syscall(SYS_linkat, a, from, b, to, flags));
}
int link(const char *from, const char *to) { return link_("link", AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int a, const char *f, int b, const char *t, int flags) { return link_("link", a, f, b, t, flags); }
int symlink(const char *from, const char *to) { return link_("symlink", 0, from, AT_FDCWD, to, 0); }
int symlinkat(const char *from, int b, const char *to) { return link_("symlink", 0, from, b, to, 0); }

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    int what = of_descriptor(fd, path) ? event("truncate", path, "", size) : 0;
    if (size) ROOM();
    AFTER(syscall(SYS_ftruncate, fd, size));
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
int truncate(const char *name, off_t size) {
    char path[PATH_MAX];
    int what = of_name(AT_FDCWD, name, path) ? event("truncate", path, "", size) : 0;
    if (size) ROOM();
    AFTER(syscall(SYS_truncate, name, size));
}
int truncate64(const char *name, off_t size) { return truncate(name, size); }
int fallocate(int fd, int how, off_t from, off_t size) {
    char path[PATH_MAX];
    int what = of_descriptor(fd, path) ? event("truncate", path, "", size) : 0;
    ROOM();
    AFTER(syscall(SYS_fallocate, fd, how, from, size));
}
int fallocate64(int fd, int how, off_t from, off_t size) { return fallocate(fd, how, from, size); }
int posix_fallocate(int fd, off_t from, off_t size) { return fallocate(fd, 0, from, size) ? errno : 0; }
int posix_fallocate64(int fd, off_t from, off_t size) { return posix_fallocate(fd, from, size); }

static int open_(int folder, const char *name, int flags, mode_t rights) {
    char path[PATH_MAX];
    int what = 0;
    if ((flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC))
        what = of_name(folder, name, path) ? event("open", path, "", 0) : 0;
    if (what == FULL && flags & O_CREAT && syscall(SYS_faccessat, folder, name, F_OK)) ROOM(); /* a new file */
    AFTER(syscall(SYS_openat, folder, name, flags, rights));
}
#define RIGHTS                                                                                                         \
    mode_t rights = 0;                                                                                                 \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                                             \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        rights = va_arg(more, mode_t);                                                                                 \
        va_end(more);                                                                                                  \
    }
int open(const char *name, int flags, ...) { RIGHTS return open_(AT_FDCWD, name, flags, rights); }
int open64(const char *name, int flags, ...) { RIGHTS return open_(AT_FDCWD, name, flags, rights); }
int openat(int folder, const char *name, int flags, ...) { RIGHTS return open_(folder, name, flags, rights); }
int openat64(int folder, const char *name, int flags, ...) { RIGHTS return open_(folder, name, flags, rights); }
int __open_2(const char *name, int flags) { return open_(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return open_(AT_FDCWD, name, flags, 0); }
int __openat_2(int folder, const char *name, int flags) { return open_(folder, name, flags, 0); }
int __openat64_2(int folder, const char *name, int flags) { return open_(folder, name, flags, 0); }
int creat(const char *name, mode_t rights) { return open_(AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, rights); }
int creat64(const char *name, mode_t rights) { return creat(name, rights); }

static FILE *fopen_(const char *own, const char *name, const char *how) {
    FILE *(*usual)(const char *, const char *) = dlsym(RTLD_NEXT, own);
    char path[PATH_MAX];
    int what = strpbrk(how, "wa+") && of_name(AT_FDCWD, name, path) ? event("open", path, "", 0) : 0;
    if (what == FULL && access(name, F_OK)) {
        errno = number;
        return NULL;
    }
    FILE *file = usual(name, how);
    if (what == TEAR) die();
    return file;
}
FILE *fopen(const char *name, const char *how) { return fopen_("fopen", name, how); }
FILE *fopen64(const char *name, const char *how) { return fopen_("fopen64", name, how); }

ssize_t write(int fd, const void *bytes, size_t size) {
    char path[PATH_MAX];
    int what = of_descriptor(fd, path) ? event("write", path, "", size) : 0;
    if (allow_write(what, &size)) return -1;
    AFTER(syscall(SYS_write, fd, bytes, size));
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t from) {
    char path[PATH_MAX];
    int what = of_descriptor(fd, path) ? event("write", path, "", size) : 0;
    if (allow_write(what, &size)) return -1;
    AFTER(syscall(SYS_pwrite64, fd, bytes, size, from));
}
ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t from) { return pwrite(fd, bytes, size, from); }
ssize_t writev(int fd, const struct iovec *parts, int n) {
    char path[PATH_MAX];
    size_t size = 0;
    for (int i = 0; i < n; i++) size += parts[i].iov_len;
    int what = of_descriptor(fd, path) ? event("write", path, "", size) : 0;
    if (what && n) { /* part of the longest is enough */
        int longest = 0;
        for (int i = 1; i < n; i++)
            if (parts[i].iov_len > parts[longest].iov_len) longest = i;
        if (longest) { /* those before it, whole: a short write */
            if (what == FULL && failed++) return errno = number, -1;
            AFTER(syscall(SYS_writev, fd, parts, longest));
        }
        size_t some = parts[0].iov_len;
        if (allow_write(what, &some)) return -1;
        AFTER(syscall(SYS_write, fd, parts[0].iov_base, some));
    }
    return syscall(SYS_writev, fd, parts, n);
}
static size_t size_of(int fd, size_t most) {
    struct stat found;
    return !fstat(fd, &found) && (size_t)found.st_size < most ? (size_t)found.st_size : most;
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    char path[PATH_MAX];
    int what = of_descriptor(to, path) ? event("write", path, "", size = size_of(from, size)) : 0;
    if (allow_write(what, &size)) return -1;
    AFTER(syscall(SYS_sendfile, to, from, offset, size));
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t size) { return sendfile(to, from, offset, size); }
ssize_t copy_file_range(int from, off_t *a, int to, off_t *b, size_t size, unsigned flags) {
    char path[PATH_MAX];
    int what = of_descriptor(to, path) ? event("write", path, "", size = size_of(from, size)) : 0;
    if (allow_write(what, &size)) return -1;
    AFTER(syscall(SYS_copy_file_range, from, a, to, b, size, flags));
}

void *mmap(void *where, size_t size, int rights, int flags, int fd, off_t from) {
    char path[PATH_MAX];
    if (rights & PROT_WRITE && (flags & MAP_TYPE) != MAP_PRIVATE && of_descriptor(fd, path)) event("map", path, "", size);
    return (void *)syscall(SYS_mmap, where, size, rights, flags, fd, from);
}
void *mmap64(void *where, size_t size, int rights, int flags, int fd, off_t from) {
    return mmap(where, size, rights, flags, fd, from);
}
