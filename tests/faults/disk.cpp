// A disk that fails, and one that remembers: stands between a process and libc's file operations (LD_PRELOAD).
//
// Armed by `arm` (tests/faults/disk.py), it counts the operations below one folder, lets some of them fail, and writes
// down each that succeeded, with its data. Below Python: libraries that write by themselves (safetensors, tokenizers,
// matplotlib) meet the same disk. Not armed, it does nothing.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

char root[PATH_MAX];
size_t root_length = 0;
long first = 0, last = -1, seen = 0;  // operations that fail, and how many there were
int failure = 0;                      // errno; 0: the write takes half of what it is given, and the next ones fail
int record = -1, names = -1;          // descriptors: what was done; the names of all operations
bool reads = false;
pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

template <typename Function> Function real(const char* name, Function) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
#define REAL(name) static auto original = real(#name, &::name)

bool below(const char* path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

bool of_descriptor(int fd, char* path) {
    if (!root_length || fd < 0) return false;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length <= 0) return false;
    path[length] = 0;
    return below(path);
}

bool absolute(int directory, const char* name, char* path) {
    if (!root_length || !name) return false;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char base[PATH_MAX];
        if (directory == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, sizeof base) <= 0) return false;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            long length = syscall(SYS_readlinkat, AT_FDCWD, link, base, PATH_MAX - 1);
            if (length <= 0) return false;
            base[length] = 0;
        }
        if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return false;
    }
    return below(path);
}

// One operation at a time, in all processes that record: what is written down is the order in which it happened.
struct Turn {
    int kept;
    Turn() : kept(errno) {
        pthread_mutex_lock(&lock);
        if (record >= 0) flock(record, LOCK_EX);
        errno = kept;
    }
    ~Turn() {
        int said = errno;
        if (record >= 0) flock(record, LOCK_UN);
        pthread_mutex_unlock(&lock);
        errno = said;
    }
};

void put(int fd, const void* data, size_t size) {
    const char* at = static_cast<const char*>(data);
    while (size) {
        long done = syscall(SYS_write, fd, at, size);
        if (done <= 0) return;
        at += done, size -= done;
    }
}

// Counts an operation; true where it must fail, with errno set.
bool fails(const char* operation, const char* path) {
    long number = ++seen;
    if (names >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld\t%s\t%s\n", number, operation, path + root_length);
        put(names, line, length);
    }
    if (number < first || number > last) return false;
    errno = failure ? failure : ENOSPC;
    return true;
}

bool shortened(long number) { return !failure && number == first; }

void note(const char* kind, const char* one, const char* two, unsigned long long inode, long long at,
          const void* data, size_t size) {
    if (record < 0) return;
    char line[2 * PATH_MAX + 128];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%llu\t%lld\t%zu\n", kind, one ? one + root_length : "",
                          two ? two + root_length : "", inode, at, size);
    put(record, line, length);
    if (size) put(record, data, size);
}

unsigned long long inode_of(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}

unsigned long long inode_at(const char* path) {
    struct stat status;
    return lstat(path, &status) ? 0 : status.st_ino;
}

int opened(const char* name, int directory, const char* asked, int flags, mode_t mode,
           int (*open_at)(int, const char*, int, mode_t)) {
    char path[PATH_MAX];
    bool writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT;
    if (!absolute(directory, asked, path) || (!writes && (!reads || flags & O_DIRECTORY)))
        return open_at(directory, asked, flags, mode);
    Turn turn;
    if (fails(writes ? name : "open to read", path)) return -1;
    bool there = inode_at(path) != 0;
    int fd = open_at(directory, asked, flags, mode);
    if (fd >= 0 && writes && !there) note("create", path, nullptr, inode_of(fd), 0, nullptr, 0);
    if (fd >= 0 && there && flags & O_TRUNC) note("truncate", path, nullptr, inode_of(fd), 0, nullptr, 0);
    return fd;
}

int plain_open(int directory, const char* path, int flags, mode_t mode) {
    return syscall(SYS_openat, directory, path, flags, mode);
}

}  // namespace

extern "C" {

// first, last: operations that fail with `code`; 0: the first one, a write, takes half, the rest have no room.
void arm(const char* folder, long from, long to, int code, int recording, int naming, int reading) {
    pthread_mutex_lock(&lock);
    seen = 0, first = from, last = to, failure = code, record = recording, names = naming, reads = reading;
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    pthread_mutex_unlock(&lock);
}

long operations() { return seen; }

#define MODE                                        \
    mode_t mode = 0;                                \
    if (flags & (O_CREAT | O_TMPFILE)) {            \
        va_list rest;                               \
        va_start(rest, flags);                      \
        mode = va_arg(rest, mode_t);                \
        va_end(rest);                               \
    }

int open(const char* path, int flags, ...) { MODE return opened("open", AT_FDCWD, path, flags, mode, plain_open); }
int open64(const char* path, int flags, ...) { MODE return opened("open", AT_FDCWD, path, flags, mode, plain_open); }
int openat(int at, const char* path, int flags, ...) { MODE return opened("open", at, path, flags, mode, plain_open); }
int openat64(int at, const char* path, int flags, ...) { MODE return opened("open", at, path, flags, mode, plain_open); }
int creat(const char* path, mode_t mode) {
    return opened("open", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode, plain_open);
}

ssize_t write(int fd, const void* data, size_t size) {
    char path[PATH_MAX];
    if (!of_descriptor(fd, path)) return syscall(SYS_write, fd, data, size);
    Turn turn;
    if (fails("write", path)) {
        if (!shortened(seen) || size < 2) return -1;
        size /= 2;
    }
    ssize_t done = syscall(SYS_write, fd, data, size);
    if (done > 0) note("write", path, nullptr, inode_of(fd), lseek(fd, 0, SEEK_CUR) - done, data, done);
    return done;
}

static ssize_t pwritten(int fd, const void* data, size_t size, off64_t at) {
    char path[PATH_MAX];
    if (!of_descriptor(fd, path)) return syscall(SYS_pwrite64, fd, data, size, at);
    Turn turn;
    if (fails("pwrite", path)) {
        if (!shortened(seen) || size < 2) return -1;
        size /= 2;
    }
    ssize_t done = syscall(SYS_pwrite64, fd, data, size, at);
    if (done > 0) note("write", path, nullptr, inode_of(fd), at, data, done);
    return done;
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t at) { return pwritten(fd, data, size, at); }
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) { return pwritten(fd, data, size, at); }

ssize_t writev(int fd, const struct iovec* parts, int count) {
    char path[PATH_MAX];
    if (!of_descriptor(fd, path)) return syscall(SYS_writev, fd, parts, count);
    for (int index = 0; index < count; index++)  // a short write is legal
        if (parts[index].iov_len) return write(fd, parts[index].iov_base, parts[index].iov_len);
    return 0;
}

ssize_t read(int fd, void* data, size_t size) {
    char path[PATH_MAX];
    if (reads && of_descriptor(fd, path)) {
        Turn turn;
        if (fails("read", path)) return -1;
    }
    return syscall(SYS_read, fd, data, size);
}

static int synced(const char* name, int fd, long call) {
    char path[PATH_MAX];
    if (!of_descriptor(fd, path)) return syscall(call, fd);
    Turn turn;
    if (fails(name, path)) return -1;
    int result = syscall(call, fd);
    if (!result) note("sync", path, nullptr, inode_of(fd), 0, nullptr, 0);
    return result;
}
int fsync(int fd) { return synced("fsync", fd, SYS_fsync); }
int fdatasync(int fd) { return synced("fdatasync", fd, SYS_fdatasync); }

static int cut(int fd, off64_t size) {
    char path[PATH_MAX];
    if (!of_descriptor(fd, path)) return syscall(SYS_ftruncate, fd, size);
    Turn turn;
    if (fails("ftruncate", path)) return -1;
    int result = syscall(SYS_ftruncate, fd, size);
    if (!result) note("truncate", path, nullptr, inode_of(fd), size, nullptr, 0);
    return result;
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int renamed(int from_at, const char* from, int to_at, const char* to) {
    char one[PATH_MAX], two[PATH_MAX];
    if (!absolute(from_at, from, one) || !absolute(to_at, to, two))
        return syscall(SYS_renameat2, from_at, from, to_at, to, 0);
    Turn turn;
    if (fails("rename", one)) return -1;
    int result = syscall(SYS_renameat2, from_at, from, to_at, to, 0);
    if (!result) note("rename", one, two, inode_at(two), 0, nullptr, 0);
    return result;
}
int rename(const char* from, const char* to) { return renamed(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int from_at, const char* from, int to_at, const char* to) { return renamed(from_at, from, to_at, to); }

int mkdirat(int at, const char* name, mode_t mode) {
    char path[PATH_MAX];
    if (!absolute(at, name, path)) return syscall(SYS_mkdirat, at, name, mode);
    Turn turn;
    if (fails("mkdir", path)) return -1;
    int result = syscall(SYS_mkdirat, at, name, mode);
    if (!result) note("mkdir", path, nullptr, inode_at(path), 0, nullptr, 0);
    return result;
}
int mkdir(const char* name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int at, const char* name, int flags) {
    char path[PATH_MAX];
    if (!absolute(at, name, path)) return syscall(SYS_unlinkat, at, name, flags);
    Turn turn;
    if (fails(flags & AT_REMOVEDIR ? "rmdir" : "unlink", path)) return -1;
    int result = syscall(SYS_unlinkat, at, name, flags);
    if (!result) note("unlink", path, nullptr, 0, 0, nullptr, 0);
    return result;
}
int unlink(const char* name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char* name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int fchmodat(int at, const char* name, mode_t mode, int flags) {
    char path[PATH_MAX];
    if (absolute(at, name, path)) {
        Turn turn;
        if (fails("chmod", path)) return -1;
    }
    return syscall(SYS_fchmodat, at, name, mode);
}
int chmod(const char* name, mode_t mode) { return fchmodat(AT_FDCWD, name, mode, 0); }

// Python copies with these, and by itself where they are not to be had.
ssize_t sendfile(int out, int in, off_t* at, size_t size) {
    char path[PATH_MAX];
    if (of_descriptor(out, path)) return errno = EINVAL, -1;
    return syscall(SYS_sendfile, out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t* at, size_t size) { return sendfile(out, in, at, size); }
ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags) {
    char path[PATH_MAX];
    if (of_descriptor(out, path)) return errno = EXDEV, -1;
    return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

}  // extern "C"
