#!/bin/sh
# Everything from a fresh clone to the last test: install, build, lint, test.
set -eu
cd "$(dirname "$0")/.."
sh test/install.sh
npm ci --no-fund --no-audit
npm run build
npm run lint
npm test
