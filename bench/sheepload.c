/* sheepload: closed-loop load generator for Sheepdog nodes, without a gateway, to compare a gateway with.
 * usage: sheepload PORT[,PORT...] connections_per_node depth block_bytes read|write|copy rand|seq|each seconds VID_HEX
 *        span_bytes [count [BASE_VID_HEX]]
 * Nodes are on loopback. The VDI must have all its objects, of 4 MiB, under its own vid ("dog vdi create -P"), and no block
 * crosses the end of an object. "each": one block at a random place in each object in turn. count: end after this many requests
 * instead of seconds. "copy": the first write to an object after a snapshot: creates the object as a copy of BASE_VID's with the
 * block written over it, and then enters it in the table.
 * prints: requests/s MB/s p50us p99us maxus
 * gcc -O2 sheepload.c -o sheepload */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "load-timing.h"

#define MAX_CONNECTIONS 64
#define OBJECT_BYTES (4u << 20)
#define HEADER_BYTES 48
#define TABLE_OFFSET 4664 /* offset of the table in an inode */
#define VDI_BIT (1ull << 63)
#define ID_MASK 0xfffffu /* start times are kept by the low bits of the request's id */

struct connection {
  int fd;
  char *out; /* requests that the socket has not taken yet: out[sent..queued) */
  size_t queued, sent;
  char header[HEADER_BYTES];
  size_t header_have, payload_left;
  char *sink;
};

static struct connection conns[MAX_CONNECTIONS];
static int n_conns;
static char *data;
static size_t block;
static int is_write, is_copy;
static char order;
static uint32_t vid, base_vid, last_id;
static uint64_t span, count, issued;
static double started[ID_MASK + 1];
static uint32_t object_of[ID_MASK + 1]; /* whose entry is still to be written, plus one; 0: none */

static void queue(struct connection *c, const char *header, const void *payload, size_t length) {
  memmove(c->out, c->out + c->sent, c->queued - c->sent);
  c->queued -= c->sent;
  c->sent = 0;
  memcpy(c->out + c->queued, header, HEADER_BYTES);
  c->queued += HEADER_BYTES;
  if (length == 0) return;
  memcpy(c->out + c->queued, payload, length);
  c->queued += length;
}

static void queue_request(struct connection *c) {
  uint64_t objects = span / OBJECT_BYTES, per_object = OBJECT_BYTES / block, at = issued++;
  uint64_t n = (order == 'r' ? next_random() : at) % (objects * per_object);
  if (order == 'e') n = at % objects * per_object + next_random() % per_object;
  char header[HEADER_BYTES] = {0};
  uint32_t id = ++last_id;
  header[0] = 2;
  header[1] = is_copy ? 1 : is_write ? 3 : 2;
  header[2] = is_copy ? 3 : is_write ? 1 : 0;
  *(uint32_t *)(header + 8) = id;
  *(uint32_t *)(header + 12) = block;
  *(uint64_t *)(header + 16) = (uint64_t)vid << 32 | n / per_object;
  if (is_copy) *(uint64_t *)(header + 24) = (uint64_t)base_vid << 32 | n / per_object;
  *(uint32_t *)(header + 40) = n % per_object * block;
  started[id & ID_MASK] = now();
  object_of[id & ID_MASK] = is_copy ? n / per_object + 1 : 0;
  queue(c, header, data, is_write ? block : 0);
}

static void queue_entry(struct connection *c, uint32_t object, double since) {
  char header[HEADER_BYTES] = {0};
  uint32_t id = ++last_id;
  header[0] = 2;
  header[1] = 3;
  header[2] = 1;
  *(uint32_t *)(header + 8) = id;
  *(uint32_t *)(header + 12) = sizeof vid;
  *(uint64_t *)(header + 16) = VDI_BIT | (uint64_t)vid << 32;
  *(uint32_t *)(header + 40) = TABLE_OFFSET + object * sizeof vid;
  started[id & ID_MASK] = since;
  object_of[id & ID_MASK] = 0;
  queue(c, header, &vid, sizeof vid);
}

/* Receives an answer or a part of it. Returns whether it is complete, and the request that it belongs to. */
static int receive(struct connection *c) {
  ssize_t got;
  while (c->header_have < HEADER_BYTES) {
    got = read(c->fd, c->header + c->header_have, HEADER_BYTES - c->header_have);
    if (got <= 0) return 0;
    c->header_have += got;
    if (c->header_have < HEADER_BYTES) continue;
    c->payload_left = *(uint32_t *)(c->header + 12);
    if (*(uint32_t *)(c->header + 16) != 0) {
      fprintf(stderr, "a node answers %x\n", *(uint32_t *)(c->header + 16));
      exit(1);
    }
  }
  while (c->payload_left > 0) {
    got = read(c->fd, c->sink, c->payload_left < block ? c->payload_left : block);
    if (got <= 0) return 0;
    c->payload_left -= got;
  }
  c->header_have = 0;
  uint32_t id = *(uint32_t *)(c->header + 8) & ID_MASK;
  if (object_of[id] != 0) {
    queue_entry(c, object_of[id] - 1, started[id]);
    return 0;
  }
  note_latency(started[id]);
  return 1;
}

static void open_connection(int port, int depth) {
  struct connection *c = &conns[n_conns++];
  struct sockaddr_in address = {
      .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int on = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(c->fd, (void *)&address, sizeof address) < 0) {
    perror("connect");
    exit(1);
  }
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(c->fd, F_SETFL, O_NONBLOCK);
  c->out = malloc((size_t)depth * (HEADER_BYTES + block));
  c->sink = malloc(block);
}

int main(int argc, char **argv) {
  if (argc < 10) return 2;
  int per_node = atoi(argv[2]), depth = atoi(argv[3]);
  block = atol(argv[4]);
  is_copy = !strcmp(argv[5], "copy");
  is_write = is_copy || !strcmp(argv[5], "write");
  order = argv[6][0];
  double seconds = atof(argv[7]);
  vid = strtoul(argv[8], 0, 16);
  span = strtoull(argv[9], 0, 0);
  count = argc > 10 ? strtoull(argv[10], 0, 0) : 0;
  base_vid = argc > 11 ? strtoul(argv[11], 0, 16) : 0;
  data = malloc(block);
  for (size_t i = 0; i < block; i++) data[i] = next_random();
  for (char *port = strtok(argv[1], ","); port; port = strtok(0, ","))
    for (int i = 0; i < per_node && n_conns < MAX_CONNECTIONS; i++) open_connection(atoi(port), depth);

  double begin = now();
  uint64_t answered = 0;
  int in_flight = 0, turn = 0;
  for (; in_flight < depth && !(count && issued >= count); in_flight++) queue_request(&conns[turn++ % n_conns]);
  while (in_flight > 0) {
    struct pollfd polled[MAX_CONNECTIONS];
    for (int i = 0; i < n_conns; i++)
      polled[i] = (struct pollfd){conns[i].fd, POLLIN | (conns[i].queued > conns[i].sent ? POLLOUT : 0), 0};
    poll(polled, n_conns, 1000);
    int is_late = !count && now() - begin >= seconds;
    for (int i = 0; i < n_conns; i++) {
      struct connection *c = &conns[i];
      while (polled[i].revents & (POLLIN | POLLHUP) && receive(c)) {
        answered++;
        in_flight--;
        if (is_late || (count && issued >= count)) continue;
        queue_request(&conns[turn++ % n_conns]);
        in_flight++;
      }
      while (c->queued > c->sent) {
        ssize_t put = write(c->fd, c->out + c->sent, c->queued - c->sent);
        if (put <= 0) break;
        c->sent += put;
      }
    }
  }
  double took = now() - begin;
  print_result(answered, block, took);
  return 0;
}
