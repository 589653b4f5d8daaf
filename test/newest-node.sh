#!/bin/sh
# The quick tests (npm run test:quick) with the newest Node, from npm's package "node", kept in ~/.cache. If it cannot be
# installed or started, the reason is printed and the run does not fail.
set -u
cd "$(dirname "$0")/.." || exit 1
cache="${XDG_CACHE_HOME:-$HOME/.cache}/sheepgate-newest-node"
mkdir -p "$cache" || exit 1
if ! said=$(npm install --prefix "$cache" --no-save --no-fund --no-audit --loglevel=error node@latest 2>&1); then
  echo "skipped: the quick tests on the newest Node: npm cannot install the package \"node\": $said"
  exit 0
fi
node="$cache/node_modules/node/bin/node"
if ! version=$("$node" --version 2>&1); then
  echo "skipped: the quick tests on the newest Node: it does not start here: $version"
  exit 0
fi
echo "the quick tests on Node $version (this machine's own is $(node --version))"
SHEEPGATE_TEST_LENGTH=quick exec "$node" node_modules/vitest/vitest.mjs run --project own
