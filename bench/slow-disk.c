/* A slow disk for attacks.mjs, by LD_PRELOAD: writes and syncs of the objects and logs of the store SLOW_DISK take
 * SLOW_WRITE_MS and SLOW_SYNC_MS longer. Calls on the event loop block it, as with a real disk that cannot keep up. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void delay(int fd, const char *by)
{
    const char *ms = getenv(by), *where = getenv("SLOW_DISK");
    char link[32], name[4096];
    int saved = errno;
    ssize_t length;

    if (ms == NULL || where == NULL)
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, name, sizeof name - 1);
    if (length > 0) {
        name[length] = 0;
        const char *within = name + strlen(where);

        if (strncmp(name, where, strlen(where)) == 0 &&
            (strncmp(within, "/objects/", 9) == 0 || strncmp(within, "/recent/", 8) == 0)) {
            struct timespec time = { atol(ms) / 1000, atol(ms) % 1000 * 1000000 };
            while (nanosleep(&time, &time) != 0)
                ;
        }
    }
    errno = saved;
}

#define REAL(type, name, ...)                                                  \
    static type (*real)(__VA_ARGS__);                                          \
    if (real == NULL)                                                          \
        real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t length)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    delay(fd, "SLOW_WRITE_MS");
    return real(fd, data, length);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    delay(fd, "SLOW_WRITE_MS");
    return real(fd, data, length, offset);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    return pwrite64(fd, data, length, offset);
}

int fdatasync(int fd)
{
    REAL(int, "fdatasync", int);
    delay(fd, "SLOW_SYNC_MS");
    return real(fd);
}

int fsync(int fd)
{
    REAL(int, "fsync", int);
    delay(fd, "SLOW_SYNC_MS");
    return real(fd);
}
