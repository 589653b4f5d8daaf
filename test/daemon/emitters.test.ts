/**
 * An error event without a listener ends the process. This test lists every place that creates an emitter of such events, and
 * where its listener is: each new place must be checked and added.
 */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const MAKES = new RegExp(
  [
    /\bnet\.(?:connect|createServer|createConnection)\(/,
    /\bnew (?:net\.)?(?:Socket|Worker|EventEmitter|Duplex|Readable|Writable|Transform|PassThrough)\(/,
    /\bhttps?\.(?:request|get|createServer)\(/,
    /\btls\.(?:connect|createServer)\(/,
    /(?<!\.)\b(?:spawn|fork|exec|execFile)\(/,
    /\bcreate(?:Read|Write)Stream\(/,
    /\bcreateInterface\(/,
    /\bprocess\.std(?:in|out|err)\b/,
    /\bon\('upgrade'|\bonce\('upgrade'/,
  ]
    .map(({ source }) => source)
    .join('|'),
);

/** Why each error of it has a listener. */
const KNOWN: Readonly<Record<string, string>> = {
  'nbd/src/client/connect-socket.ts':
    'until connected; the constructor of NbdClient listens from then on, under TLS connectTls in between',
  'nbd/src/server/in-place-socket.ts': 'handed to Connection in the same turn, which listens for its whole life',
  'nbd/src/server/listening.ts': 'isListenedOn: where it is made',
  'nbd/src/server/server.ts':
    'a listener of servers from the first moment; sockets go to Connection, or are refused with a listener',
  'nbd/src/protocol/tls.ts':
    'the server never listens; Node hands errors of its sockets to tlsClientError, the client listens itself',
  'src/jobs/freeze.ts': 'the child and its streams, where they are made; reading lines hears of nothing but lines',
  'src/jobs/image-source.ts': 'where it is taken; who iterates over it hears of errors as well',
  'src/jobs/image-target.ts': 'toStream listens to what it is given, before anything is written',
  'src/cli/command-io.ts': 'process.stdout and process.stderr: main.ts',
  'src/cli/main.ts': 'process.stdout and process.stderr have listeners here, for all commands',
  'src/cli/progress.ts': 'process.stderr: main.ts',
  'src/jobs/run-command.ts': 'the child and its streams, where they are made; process.stderr: main.ts',
  'src/jobs/thaw-guard.ts': 'a process of its own, with listeners on all three',
  'src/operations/control-client.ts': 'the request, where it is made; upgraded sockets where they come',
  'src/daemon/control/control-server.ts':
    'the server, requests, answers and upgraded sockets, where they are made or come',
  'src/operations/socket-state.ts': 'where it is made',
  'src/store/sheep/connection.ts': 'until connected where it is made, from then on #attach',
};

function sources(directory: string): string[] {
  return fs
    .readdirSync(path.join(ROOT, directory), { recursive: true, encoding: 'utf8' })
    .flatMap((name) => (name.endsWith('.ts') && !name.endsWith('.d.ts') ? [`${directory}/${name}`] : []));
}

test('every place that creates a socket, a stream, a server or a child is listed with the listener for its errors', () => {
  const found = [...sources('src'), ...sources('nbd/src')].filter((file) => {
    const code = fs.readFileSync(path.join(ROOT, file), 'utf8');
    return code.split('\n').some((line) => !/^\s*(?:\*|\/\/|\/\*)/.test(line) && MAKES.test(line));
  });
  expect(found.sort()).toEqual(Object.keys(KNOWN).sort());
});
