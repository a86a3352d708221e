/* Shifts the wall clock of one process by CLOCK_SHIFT seconds: for boots in 1970 on a machine whose clock is everybody's (bench/node_offline_answered.py).
   Only what tells the date is shifted. faketime (Debian, 0.9.10) shifts waiting too: Python's sleep ends with EINVAL under it. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
  const char *told = getenv("CLOCK_SHIFT");
  return told ? atol(told) : 0;
}

int clock_gettime(clockid_t which, struct timespec *now) {
  int code = (int)syscall(SYS_clock_gettime, which, now);
  if (!code && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
  return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec precise;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (out) *out = precise.tv_sec;
  return precise.tv_sec;
}
