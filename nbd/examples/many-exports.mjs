// Disks for clients that prove who they are: the exports of a client are the files in DISKS/ITS NAME, by its certificate.
// node many-exports.mjs DISKS CERTIFICATES nbds://0.0.0.0, with ca-cert.pem, server-cert.pem, server-key.pem in CERTIFICATES
import { readFileSync } from 'node:fs';
import fs from 'node:fs/promises';
import { join } from 'node:path';
import { createServer, formatNbdUri, shared } from 'nbd-server-ts';

const [disks, certificates, uri] = process.argv.slice(2);
const pem = (name) => readFileSync(join(certificates, `${name}.pem`));
/** No slashes and no dots: a name must not lead to another directory. */
const isPlain = (name) => /^[\w-]+$/.test(name);
const userOf = ({ tls }) => tls?.certificateNames.find(isPlain);

// Opened with the first connection, closed with the last.
const image = shared(async (name) => {
  const file = await fs.open(join(disks, name), 'r+').catch(() => undefined);
  return (
    file && {
      size: (await file.stat()).size,
      read: (offset, into) => file.read(into, 0, into.length, offset),
      write: (offset, data) => file.write(data, 0, data.length, offset),
      flush: () => file.datasync(),
      close: () => file.close(),
    }
  );
});

const server = createServer({
  tls: {
    mode: 'require',
    // Read for every connection: new certificates need no restart.
    material: () => ({
      certificate: { chain: pem('server-cert'), key: pem('server-key') },
      authorities: pem('ca-cert'),
      verifyPeer: true,
    }),
  },
  exports: (name, { peer, signal }) => {
    const user = userOf(peer);
    return user !== undefined && isPlain(name) ? image(`${user}/${name}`, { signal }) : null;
  },
  list: async (peer) => {
    const user = userOf(peer);
    return user === undefined ? [] : (await fs.readdir(join(disks, user)).catch(() => [])).filter(isPlain);
  },
});
const { host, port } = await server.listen(uri);
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close());
console.log(formatNbdUri({ host, port, tls: true }));
