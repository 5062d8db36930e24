/* A shim around the system calls that change the disk (LD_PRELOAD): counts those that touch one folder, makes the n-th
   of them fail, every write a short one, or stops before each call and in each write. See tests/faults_calls.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum fault { NONE, NO_SPACE, IO_ERROR, SHORT_WRITES, PAUSES };
#define MOST_CALLS 100000
#define MOST_FILES 4096

static char root[4096];
static char kinds[MOST_CALLS]; /* o w f r u m d t: which call the n-th one was */
static unsigned char inside[MOST_FILES];
static long calls, strike_at = -1;
static enum fault fault;

void faulty_arm(const char *folder, long at, int what) {
    strncpy(root, folder, sizeof root - 1);
    strike_at = at;
    fault = what;
    calls = 0;
}

long faulty_calls(char *into, long most) {
    long n = calls < most ? calls : most;
    memcpy(into, kinds, n);
    return n;
}

static int ours(const char *path) { return root[0] && path && strncmp(path, root, strlen(root)) == 0; }

static void pause_here(void) {
    if (fault == PAUSES) kill(getpid(), SIGSTOP);
}

/* Counts a call; 1 when it has to fail, with errno set. */
static int strikes(char kind) {
    long n = calls++;
    if (n < MOST_CALLS) kinds[n] = kind;
    pause_here();
    if (n != strike_at) return 0;
    errno = fault == NO_SPACE ? ENOSPC : EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(name, kind, path, ...)                \
    do {                                              \
        if (ours(path) && strikes(kind)) return -1;   \
        return REAL(name)(__VA_ARGS__);               \
    } while (0)

static int changes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_DIRECTORY); }

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        va_list rest;                                                               \
        va_start(rest, flags);                                                      \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;     \
        va_end(rest);                                                               \
        int mine = ours(path);                                                      \
        if (mine && changes(flags) && strikes('o')) return -1;                      \
        int file = REAL(name)(path, flags, mode);                                   \
        if (file >= 0 && file < MOST_FILES) inside[file] = mine;                    \
        return file;                                                                \
    }
OPEN(open)
OPEN(open64)

int close(int file) {
    if (file >= 0 && file < MOST_FILES) inside[file] = 0;
    return REAL(close)(file);
}

static int known(int file) { return file >= 0 && file < MOST_FILES && inside[file]; }

ssize_t write(int file, const void *data, size_t count) {
    if (!known(file)) return REAL(write)(file, data, count);
    int failed = strikes('w');
    int reason = errno;
    if (!failed && fault != PAUSES && fault != SHORT_WRITES) return REAL(write)(file, data, count);
    ssize_t half = REAL(write)(file, data, (count + 1) / 2);
    errno = reason;
    if (failed) return -1; /* at its worst a failing write leaves half of its bytes */
    if (fault == SHORT_WRITES || half < 0) return half;
    pause_here();
    ssize_t rest = REAL(write)(file, (const char *)data + half, count - half);
    return rest < 0 ? rest : half + rest;
}

int fsync(int file) {
    if (known(file) && strikes('f')) return -1;
    return known(file) ? 0 : REAL(fsync)(file); /* the page cache outlives a killed process: no need to wait */
}

int ftruncate(int file, off_t length) {
    if (known(file) && strikes('t')) return -1;
    return REAL(ftruncate)(file, length);
}
int ftruncate64(int file, off64_t length) {
    if (known(file) && strikes('t')) return -1;
    return REAL(ftruncate64)(file, length);
}
int rename(const char *from, const char *to) { ON_PATH(rename, 'r', to, from, to); }
int unlink(const char *path) { ON_PATH(unlink, 'u', path, path); }
int rmdir(const char *path) { ON_PATH(rmdir, 'd', path, path); }
int mkdir(const char *path, mode_t mode) { ON_PATH(mkdir, 'm', path, path, mode); }
