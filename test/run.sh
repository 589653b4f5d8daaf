#!/bin/sh
# Everything from a fresh clone to the last test: install, build, lint, test.
set -eu
cd "$(dirname "$0")/.."
sh test/install.sh
npm ci --no-fund --no-audit
npm run build
npm run lint
npm test
# The newest Node, if npm has it: we want to see failures with it before users do.
npm run test:newest-node
# The newest clients in Debian change at any time: their failures are reported, and do not fail this run.
npm run test:newest || echo "test/run.sh: tests with the newest clients failed (see above); this does not fail the run"
