// Copy a disk to another one that is at least as large: node copy.mjs nbd://SOURCE/NAME nbd://DESTINATION/NAME
import { copy, ReconnectingClient } from 'nbd-server-ts/client';

const [from, to] = process.argv.slice(2);
const stop = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => stop.abort());

// Clients that connect again, and continue, if a server is restarted.
const source = await ReconnectingClient.connect({ uri: from });
const target = await ReconnectingClient.connect({ uri: to });
const { copied, zeroed } = await copy(source, target, {
  signal: stop.signal,
  onProgress: ({ copied, zeroed, total }) =>
    process.stderr.write(`\r${Math.floor((100 * (copied + zeroed)) / total)} %`),
});
process.stderr.write('\n');
console.log(`${copied} bytes copied, ${zeroed} bytes of zeros`);
await source.disconnect();
await target.disconnect();
