/*
 * Shared by the load generators with one thread: the clock, pseudo-random numbers, the latencies of requests, and the line that
 * is printed at the end: requests per second, MB per second, and the median, the 99th percentile and the maximum of the
 * latencies in microseconds.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define MAX_SAMPLES (1u << 24)

static uint32_t *latency;
static size_t n_samples;
static uint64_t random_state = 88172645463325252ull;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t next_random(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

/* A request that was sent at `started` has been answered. */
static void note_latency(double started) {
  double us = (now() - started) * 1e6;
  if (!latency) latency = malloc(sizeof *latency * MAX_SAMPLES);
  if (n_samples < MAX_SAMPLES) latency[n_samples++] = us > 4e9 ? 4000000000u : us;
}

static int compare_latencies(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return x < y ? -1 : x > y;
}

/* `answered` requests of `block` bytes took this many seconds. */
static void print_result(uint64_t answered, size_t block, double seconds) {
  if (n_samples == 0) exit(1);
  qsort(latency, n_samples, sizeof *latency, compare_latencies);
  printf("%.0f %.1f %u %u %u\n", answered / seconds, answered / seconds * block / 1e6, latency[n_samples / 2],
         latency[n_samples * 99 / 100], latency[n_samples - 1]);
}
