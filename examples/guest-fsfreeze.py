#!/usr/bin/env python3
# Freezes or thaws a guest's filesystems through the qemu guest agent's socket on the host, if there is no libvirt:
#
#   sheepgate backup vm1 --to /backup/vm1 \
#     --freeze-cmd 'python3 examples/guest-fsfreeze.py freeze /run/vm1-qga.sock' \
#     --thaw-cmd 'python3 examples/guest-fsfreeze.py thaw /run/vm1-qga.sock'
#
# Exit code 0 if the agent did it. Thawing a guest that is not frozen is not an error.
import json
import random
import socket
import sys

SECONDS = 25  # less than sheepgate's --freeze-timeout
COMMANDS = {'freeze': 'guest-fsfreeze-freeze', 'thaw': 'guest-fsfreeze-thaw', 'status': 'guest-fsfreeze-status'}

if len(sys.argv) != 3 or sys.argv[1] not in COMMANDS:
    sys.exit(f'usage: {sys.argv[0]} freeze|thaw|status SOCKET')
what, path = sys.argv[1:]
try:
    agent = socket.socket(socket.AF_UNIX)
    agent.settimeout(SECONDS)
    agent.connect(path)
    answers = agent.makefile()

    def ask(command, **arguments):
        agent.sendall(json.dumps({'execute': command, 'arguments': arguments}).encode() + b'\n')

    # Skip answers to earlier clients: ours begin after the agent repeats our number.
    number = random.randrange(2**31)
    ask('guest-sync', id=number)
    for line in answers:
        if json.loads(line).get('return') == number:
            break
    ask(COMMANDS[what])
    answer = json.loads(answers.readline())
except (OSError, ValueError) as error:
    sys.exit(f'{what} {path}: {error}')
if 'return' not in answer:
    sys.exit(f'{what} {path}: {answer.get("error", {}).get("desc", answer)}')
print(f'{what}: {answer["return"]}')
