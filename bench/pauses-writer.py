"""Writes 4 KiB at random within the first SPAN bytes of an export, DEPTH at a time, until stdin ends; a line on stdin names
the phase. Prints, per phase, writes and their latencies in microseconds as one line of JSON. For pauses.mjs."""
import json
import random
import sys
import threading
import time

import nbd

uri, depth, span = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
phases = {}
state = {"phase": None, "end": False}


def listen():
    for line in sys.stdin:
        phases.setdefault(line.strip(), [])
        state["phase"] = line.strip()
    state["end"] = True


h = nbd.NBD()
h.connect_uri(uri)
print("ready", flush=True)
threading.Thread(target=listen, daemon=True).start()
flight = 0


def issue():
    global flight
    buffer = nbd.Buffer.from_bytearray(bytearray(random.getrandbits(8) | 1 for _ in range(1)) * 4096)
    start = time.monotonic()

    def done(error):
        global flight
        flight -= 1
        if state["phase"] is not None:
            phases[state["phase"]].append(int((time.monotonic() - start) * 1e6))
        return 1

    flight += 1
    h.aio_pwrite(buffer, random.randrange(span // 4096) * 4096, done)


while True:
    while flight < depth and not state["end"]:
        issue()
    if state["end"] and flight == 0:
        break
    h.poll(1000)
h.shutdown()
for name, seen in phases.items():
    seen.sort()
    if not seen:
        continue
    at = lambda share: seen[min(len(seen) - 1, int(len(seen) * share))]
    print(json.dumps({"phase": name, "writes": len(seen), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": seen[-1]}))
