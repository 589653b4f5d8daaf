/**
 * Preloaded into a daemon, lets LMDB fail where no full disk reaches reliably: in the write of the page that makes a commit
 * valid, and at the beginning of a transaction. The directory $FAILING_LMDB has the orders, one file each, with the errno as
 * its text; a file is gone when what it orders has been done.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/** mdb.c: the two meta pages are the first of the file; only a part of one is written. */
#define META_PAGES_BYTES 8192
#define PAGE_BYTES 4096
/** nptl: of a mutex that processes share, which in a daemon are those in LMDB's lock file. */
#define SHARED_MUTEX 128

/** The errno that is ordered under `name`, once; 0 if none is. */
static int ordered(const char *name)
{
  const char *directory = getenv("FAILING_LMDB");
  char path[512], text[16] = "";
  if (!directory) return 0;
  snprintf(path, sizeof path, "%s/%s", directory, name);
  int fd = open(path, O_RDONLY);
  if (fd < 0) return 0;
  if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
  close(fd);
  return unlink(path) == 0 ? atoi(text) : 0;
}

static int is_metadata(int fd)
{
  char link[64], name[512];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, name, sizeof name - 1);
  if (length < 0) return 0;
  name[length] = 0;
  return strstr(name, "/meta.mdb") != NULL;
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = (ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
  if (offset < META_PAGES_BYTES && length < PAGE_BYTES && is_metadata(fd)) {
    int failure = ordered("meta-page");
    if (failure) {
      errno = failure;
      return -1;
    }
  }
  return real(fd, data, length, offset);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
  return pwrite64(fd, data, length, offset);
}

int pthread_mutex_lock(pthread_mutex_t *mutex)
{
  static int (*real)(pthread_mutex_t *);
  if (!real) real = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_lock");
  if (mutex->__data.__kind & SHARED_MUTEX) {
    int failure = ordered("begin");
    if (failure) return failure;
  }
  return real(mutex);
}
