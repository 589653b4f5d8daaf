#!/usr/bin/env node
// Looks at the version of Node, and then starts. In the syntax that every Node parses (ECMAScript 5): what an old one is to be
// told must not be something that it cannot read, so all the rest is in start.cjs.
'use strict';
var engines = require('../package.json').engines;
var wanted = /(\d+)\.(\d+)/.exec(engines.node);
var found = /^v?(\d+)\.(\d+)/.exec(process.version);
var isTooOld = Number(found[1]) < Number(wanted[1]) || (found[1] === wanted[1] && Number(found[2]) < Number(wanted[2]));
// Not as arguments of a call: formatters put a comma behind the last one, which old parsers refuse.
var message =
  'sheepgate: this is Node.js ' +
  process.version +
  ' (' +
  process.execPath +
  '), and sheepgate needs Node.js ' +
  wanted[0] +
  ' or later: install one (https://nodejs.org/en/download), and put its bin directory first in PATH\n';
if (isTooOld) {
  process.stderr.write(message);
  process.exitCode = 1;
} else {
  require('./start.cjs');
}
