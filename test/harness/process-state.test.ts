import { once } from 'node:events';
import net from 'node:net';
import { expect, test } from 'vitest';
import { ended, start, waitUntil } from './daemon.js';
import { isStopped, processState } from './process-state.js';

test('a stopped process is reported as stopped, with the connections that wait to be accepted', async () => {
  const child = start('python3', [
    '-c',
    'import socket, sys; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()',
  ]);
  const pid = child.pid as number;
  const [line] = (await once(child.stdout, 'data')) as [Buffer];
  const port = Number(line.toString());
  expect(isStopped(pid)).toBe(false);
  child.kill('SIGSTOP');
  await waitUntil(() => isStopped(pid), 'it is stopped');
  expect(processState(pid)).toContain('T (stopped)');
  const client = net.connect({ host: '127.0.0.1', port });
  await once(client, 'connect');
  expect(processState(pid)).toContain(`tcp port ${port} to 0: LISTEN, 0 bytes unsent, 1 unread or unaccepted`);
  client.destroy();
  child.kill('SIGKILL');
  await ended(child);
  expect(processState(pid)).toBe(`process ${pid} is gone`);
});
