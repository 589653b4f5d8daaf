#!/usr/bin/env node
// Checks the version of Node, then starts. Written in ECMAScript 5, which every Node parses, so that an old Node can print the
// message; everything else is in start.cjs.
'use strict';
var engines = require('../package.json').engines;
var wanted = /(\d+)\.(\d+)/.exec(engines.node);
var found = /^v?(\d+)\.(\d+)/.exec(process.version);
var isTooOld = Number(found[1]) < Number(wanted[1]) || (found[1] === wanted[1] && Number(found[2]) < Number(wanted[2]));
// Not as arguments of a call: formatters put a comma after the last one, which old parsers refuse.
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
