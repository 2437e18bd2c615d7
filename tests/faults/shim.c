/* Counts the file operations of a process below one folder, and makes the n-th of them fail.

   The tests compile this file, start Python with it in LD_PRELOAD, and call fault_arm() through
   ctypes. Until then every call goes straight to the C library. Nothing of this is in the product.

   An operation is: open (also to read), write, fsync, rename, unlink, rmdir, mkdir, ftruncate, link.
   Reads through a descriptor are not counted. What mmap writes cannot be seen from here. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* The same numbers stand in operations.py. */
enum action {
    COUNT,       /* nothing happens */
    KILL_BEFORE, /* SIGKILL in place of the n-th operation */
    KILL_AFTER,  /* SIGKILL right after it */
    KILL_HALF,   /* half of a write reaches the file, then SIGKILL; else as KILL_BEFORE */
    SHORT,       /* half of a write reaches the file, and the call says so; else nothing happens */
    FAIL_ONCE,   /* the n-th operation fails */
    FAIL_ON,     /* from the n-th on, all fail that would change the disk */
    DELAY        /* the n-th operation takes longer */
};

enum kind { OPEN_TO_READ, OPEN_TO_WRITE, WRITE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, TRUNCATE, LINK };

static const char *const kind_names[] = {"open to read", "open to write", "write", "fsync",
                                         "rename", "unlink", "rmdir", "mkdir", "truncate", "link"};

#define DESCRIPTORS 4096
#define LOG_BYTES (1 << 20)

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX]; /* empty: not armed */
static long wanted;           /* the operation that the fault hits, from 1 */
static long counted;
static enum action action;
static int error_number;
static long delay_microseconds;
static char names[DESCRIPTORS][192]; /* of open files below the folder, by descriptor; else empty */
static char log_text[LOG_BYTES];     /* a line an operation: its kind and its file */
static size_t log_used;

void fault_arm(const char *below, long nth, int what, int error, long microseconds)
{
    pthread_mutex_lock(&guard);
    wanted = nth;
    counted = 0;
    action = what;
    error_number = error;
    delay_microseconds = microseconds;
    log_used = 0;
    log_text[0] = 0;
    memset(names, 0, sizeof names);
    snprintf(folder, sizeof folder, "%s", below);
    pthread_mutex_unlock(&guard);
}

long fault_count(void) { return counted; }
const char *fault_log(void) { return log_text; }

/* The C library's own function. */
#define REAL(name) ((typeof(&name))real(#name))
static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

static int is_below(const char *path)
{
    size_t length = strlen(folder);
    return length && strncmp(path, folder, length) == 0 && (path[length] == '/' || !path[length]);
}

/* The path below the folder that an operation is about, or NULL. */
static const char *find(int at, const char *path, char *space)
{
    if (!folder[0] || !path)
        return NULL;
    if (path[0] == '/')
        return is_below(path) ? path + strlen(folder) : NULL;
    if (at >= 0 && at < DESCRIPTORS && names[at][0]) {
        snprintf(space, PATH_MAX, "%s/%s", names[at], path);
        return space;
    }
    if (at == AT_FDCWD && getcwd(space, PATH_MAX)) {
        size_t length = strlen(space);
        snprintf(space + length, PATH_MAX - length, "/%s", path);
        return is_below(space) ? space + strlen(folder) : NULL;
    }
    return NULL;
}

static const char *name_of(int descriptor)
{
    if (!folder[0] || descriptor < 0 || descriptor >= DESCRIPTORS || !names[descriptor][0])
        return NULL;
    return names[descriptor];
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static int changes_the_disk(enum kind kind)
{
    /* A full disk lets files be deleted; a read-only one lets nothing be. */
    if (error_number == ENOSPC)
        return kind != OPEN_TO_READ && kind != UNLINK && kind != RMDIR;
    return kind != OPEN_TO_READ;
}

enum verdict { GO_ON, FAIL, HALF, HALF_THEN_DIE, GO_ON_THEN_DIE };

/* Counts the operation and says what becomes of it. */
static enum verdict judge(enum kind kind, const char *file)
{
    enum verdict verdict = GO_ON;
    long number, wait = 0;
    if (!file)
        return GO_ON;
    pthread_mutex_lock(&guard);
    number = ++counted;
    if (log_used < LOG_BYTES - 512)
        log_used += snprintf(log_text + log_used, 512, "%s %.400s\n", kind_names[kind], file);
    if (action == FAIL_ON && number >= wanted && changes_the_disk(kind))
        verdict = FAIL;
    else if (number == wanted) {
        if (action == FAIL_ONCE)
            verdict = FAIL;
        else if (action == KILL_AFTER)
            verdict = GO_ON_THEN_DIE;
        else if (action == KILL_HALF && kind == WRITE)
            verdict = HALF_THEN_DIE;
        else if (action == KILL_BEFORE || action == KILL_HALF)
            die();
        else if (action == SHORT && kind == WRITE)
            verdict = HALF;
        else if (action == DELAY)
            wait = delay_microseconds;
    }
    pthread_mutex_unlock(&guard);
    if (wait)
        usleep(wait);
    if (verdict == FAIL)
        errno = error_number;
    return verdict;
}

/* Runs the C library's call as the verdict says. */
#define DO(kind, file, call)                      \
    do {                                          \
        enum verdict verdict = judge(kind, file); \
        if (verdict == FAIL)                      \
            return -1;                            \
        int result = call;                        \
        if (verdict == GO_ON_THEN_DIE)            \
            die();                                \
        return result;                            \
    } while (0)

static int open_at(int at, const char *path, int flags, mode_t mode)
{
    char space[PATH_MAX];
    const char *file = find(at, path, space);
    enum kind kind = flags & (O_WRONLY | O_RDWR | O_CREAT) ? OPEN_TO_WRITE : OPEN_TO_READ;
    enum verdict verdict = judge(kind, file);
    int descriptor;
    if (verdict == FAIL)
        return -1;
    descriptor = REAL(openat)(at, path, flags, mode);
    if (verdict == GO_ON_THEN_DIE)
        die();
    if (descriptor >= 0 && descriptor < DESCRIPTORS && folder[0])
        snprintf(names[descriptor], sizeof names[0], "%.190s", file ? (file[0] ? file : "/") : "");
    return descriptor;
}

#define OPEN(name)                                  \
    int name(const char *path, int flags, ...)      \
    {                                               \
        va_list rest;                               \
        mode_t mode;                                \
        va_start(rest, flags);                      \
        mode = va_arg(rest, mode_t);                \
        va_end(rest);                               \
        return open_at(AT_FDCWD, path, flags, mode); \
    }
#define OPENAT(name)                                   \
    int name(int at, const char *path, int flags, ...) \
    {                                                  \
        va_list rest;                                  \
        mode_t mode;                                   \
        va_start(rest, flags);                         \
        mode = va_arg(rest, mode_t);                   \
        va_end(rest);                                  \
        return open_at(at, path, flags, mode);         \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int descriptor)
{
    if (descriptor >= 0 && descriptor < DESCRIPTORS)
        names[descriptor][0] = 0;
    return REAL(close)(descriptor);
}

/* A write, of which half may reach the file. */
#define DO_WRITE(descriptor, size, call)                           \
    do {                                                           \
        enum verdict verdict = judge(WRITE, name_of(descriptor));  \
        if (verdict == FAIL)                                       \
            return -1;                                             \
        if ((verdict == HALF || verdict == HALF_THEN_DIE) && size > 1) \
            size /= 2;                                             \
        ssize_t result = call;                                     \
        if (verdict == HALF_THEN_DIE || verdict == GO_ON_THEN_DIE) \
            die();                                                 \
        return result;                                             \
    } while (0)

ssize_t write(int descriptor, const void *data, size_t size)
{
    DO_WRITE(descriptor, size, REAL(write)(descriptor, data, size));
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at)
{
    DO_WRITE(descriptor, size, REAL(pwrite)(descriptor, data, size, at));
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at)
{
    DO_WRITE(descriptor, size, REAL(pwrite64)(descriptor, data, size, at));
}

int fsync(int descriptor) { DO(FSYNC, name_of(descriptor), REAL(fsync)(descriptor)); }
int fdatasync(int descriptor) { DO(FSYNC, name_of(descriptor), REAL(fdatasync)(descriptor)); }
int ftruncate(int descriptor, off_t size)
{
    DO(TRUNCATE, name_of(descriptor), REAL(ftruncate)(descriptor, size));
}
int ftruncate64(int descriptor, off64_t size)
{
    DO(TRUNCATE, name_of(descriptor), REAL(ftruncate64)(descriptor, size));
}
int renameat(int at, const char *from, int to_at, const char *to)
{
    char space[PATH_MAX];
    DO(RENAME, find(to_at, to, space), REAL(renameat)(at, from, to_at, to));
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
int linkat(int at, const char *from, int to_at, const char *to, int flags)
{
    char space[PATH_MAX];
    DO(LINK, find(to_at, to, space), REAL(linkat)(at, from, to_at, to, flags));
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int unlinkat(int at, const char *path, int flags)
{
    char space[PATH_MAX];
    DO(flags & AT_REMOVEDIR ? RMDIR : UNLINK, find(at, path, space), REAL(unlinkat)(at, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int at, const char *path, mode_t mode)
{
    char space[PATH_MAX];
    DO(MKDIR, find(at, path, space), REAL(mkdirat)(at, path, mode));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
