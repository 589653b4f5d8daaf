/* iscsiload: closed-loop load generator for an iSCSI target, one session, on libiscsi; as nbdload for NBD.
 * usage: iscsiload URL depth block_bytes read|write rand|seq|each seconds span_bytes [count]
 * "each": one block at a random place in each 4 MiB in turn. count: end after this many requests instead of seconds.
 * prints: requests/s MB/s p50us p99us maxus
 * gcc -O2 iscsiload.c -o iscsiload -liscsi */
#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "load-timing.h"

#define MAX_DEPTH 256
#define OBJECT_BYTES (4u << 20)
#define SECTOR_BYTES 512

struct slot {
  struct scsi_iovec memory;
  double started;
  int is_busy;
};

static struct slot slots[MAX_DEPTH];
static struct iscsi_context *session;
static int lun, depth, is_write, in_flight;
static char order;
static size_t block;
static uint64_t span, count, issued, answered;

static void fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, iscsi_get_error(session));
  exit(1);
}

static void is_done(struct iscsi_context *iscsi, int status, void *command_data, void *private_data) {
  struct slot *slot = private_data;
  (void)iscsi;
  if (status != SCSI_STATUS_GOOD) fail("the target answers an error");
  note_latency(slot->started);
  slot->is_busy = 0;
  answered++;
  in_flight--;
  scsi_free_scsi_task(command_data);
}

static void issue(struct slot *slot) {
  uint64_t blocks = span / block, per_object = OBJECT_BYTES / block, at = issued++;
  uint64_t offset = (order == 'r' ? next_random() % blocks : at % blocks) * block;
  if (order == 'e') offset = at % (span / OBJECT_BYTES) * OBJECT_BYTES + next_random() % per_object * block;
  slot->started = now();
  slot->is_busy = 1;
  in_flight++;
  struct scsi_task *task =
      is_write ? iscsi_write16_iov_task(session, lun, offset / SECTOR_BYTES, NULL, block, SECTOR_BYTES, 0, 0, 0, 0, 0,
                                        is_done, slot, &slot->memory, 1)
               : iscsi_read16_iov_task(session, lun, offset / SECTOR_BYTES, block, SECTOR_BYTES, 0, 0, 0, 0, 0, is_done,
                                       slot, &slot->memory, 1);
  if (!task) fail("a request cannot be sent");
}

int main(int argc, char **argv) {
  if (argc < 8) return 2;
  depth = atoi(argv[2]);
  if (depth < 1 || depth > MAX_DEPTH) return 2;
  block = atol(argv[3]);
  is_write = !strcmp(argv[4], "write");
  order = argv[5][0];
  double seconds = atof(argv[6]);
  span = strtoull(argv[7], 0, 0);
  count = argc > 8 ? strtoull(argv[8], 0, 0) : 0;
  session = iscsi_create_context("iqn.2026-01.bench:initiator");
  struct iscsi_url *url = iscsi_parse_full_url(session, argv[1]);
  if (!url) fail(argv[1]);
  iscsi_set_targetname(session, url->target);
  iscsi_set_session_type(session, ISCSI_SESSION_NORMAL);
  if (iscsi_full_connect_sync(session, url->portal, url->lun) != 0) fail(argv[1]);
  lun = url->lun;
  for (int i = 0; i < depth; i++) {
    slots[i].memory.iov_base = malloc(block);
    slots[i].memory.iov_len = block;
    for (size_t at = 0; at < block; at++) ((char *)slots[i].memory.iov_base)[at] = next_random();
  }

  double begin = now();
  for (;;) {
    int is_over = count ? issued >= count : now() - begin >= seconds;
    for (int i = 0; i < depth && !is_over; i++) {
      if (!slots[i].is_busy) issue(&slots[i]);
      is_over = count && issued >= count;
    }
    if (is_over && in_flight == 0) break;
    struct pollfd polled = {iscsi_get_fd(session), iscsi_which_events(session), 0};
    poll(&polled, 1, 1000);
    if (iscsi_service(session, polled.revents) < 0) fail("the session is lost");
  }
  double took = now() - begin;
  print_result(answered, block, took);
  iscsi_logout_sync(session);
  return 0;
}
