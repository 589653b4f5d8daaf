/**
 * Certificates for tests, made by openssl(1): an authority, and what it signs. They are strings; with `writeTo` they are also
 * files under the names that nbdkit, libnbd and qemu share. Owns a temporary directory, and removes it.
 */

import { execFile } from 'node:child_process';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

/** A certificate and its key, PEM. */
export interface Pair {
  readonly chain: string;
  readonly key: string;
}

const CURVE = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-utf8'];

export class Authority {
  readonly pair: Pair;

  private constructor(pair: Pair) {
    this.pair = pair;
  }

  static async make(name: string): Promise<Authority> {
    return inDirectory(async (place, openssl) => {
      await openssl(
        ...['req', '-x509', ...CURVE, '-subj', `/CN=${name}`, '-days', '30'],
        ...['-keyout', place('key'), '-out', place('crt')],
      );
      return new Authority(await readPair(place));
    });
  }

  /**
   * A certificate whose subject has the lines of `subject` ("O = Example"), and whose alternative names are those of
   * `altNames` ("URI.1 = spiffe://x"): both as in config(5) of OpenSSL. `sections`: further ones, for "dirName".
   */
  async sign(
    subject: readonly string[],
    altNames: readonly string[] = [],
    sections: readonly string[] = [],
  ): Promise<Pair> {
    return inDirectory(async (place, openssl) => {
      const lines = [
        ...['[req]', 'prompt = no', 'distinguished_name = dn', 'string_mask = utf8only', 'utf8 = yes'],
        ...['[dn]', ...subject],
        ...['[ext]', ...(altNames.length > 0 ? ['subjectAltName = @alt'] : ['keyUsage = digitalSignature'])],
        ...['[alt]', ...altNames, ...sections],
      ];
      await writeFile(place('conf'), lines.join('\n'));
      await writeFile(place('ca.crt'), this.pair.chain);
      await writeFile(place('ca.key'), this.pair.key);
      await openssl(
        ...['req', ...CURVE, '-config', place('conf'), '-keyout', place('key'), '-out', place('csr')],
        ...(subject.length === 0 ? ['-subj', '/'] : []),
      );
      await openssl(
        ...['x509', '-req', '-in', place('csr'), '-CA', place('ca.crt'), '-CAkey', place('ca.key')],
        ...['-CAcreateserial', '-days', '30', '-extfile', place('conf'), '-extensions', 'ext', '-out', place('crt')],
      );
      return readPair(place);
    });
  }

  /** Write what a client (tls-certificates=DIR) or server of other projects needs. */
  async writeTo(directory: string, role: 'client' | 'server', pair: Pair): Promise<void> {
    await mkdir(directory, { recursive: true });
    await writeFile(join(directory, 'ca-cert.pem'), this.pair.chain);
    await writeFile(join(directory, `${role}-cert.pem`), pair.chain);
    await writeFile(join(directory, `${role}-key.pem`), pair.key, { mode: 0o600 });
  }
}

/** What openssl(1) prints of a certificate with these options. */
export async function opensslText(pem: string, ...options: string[]): Promise<string> {
  return inDirectory(async (place, openssl) => {
    await writeFile(place('crt'), pem);
    return openssl('x509', '-noout', '-in', place('crt'), ...options);
  });
}

type Place = (name: string) => string;

async function inDirectory<T>(
  work: (place: Place, openssl: (...args: string[]) => Promise<string>) => Promise<T>,
): Promise<T> {
  const directory = await mkdtemp(join(tmpdir(), 'nbd-tls-'));
  try {
    return await work(
      (name) => join(directory, name),
      async (...args) => (await promisify(execFile)('openssl', args)).stdout,
    );
  } finally {
    await rm(directory, { recursive: true });
  }
}

async function readPair(place: Place): Promise<Pair> {
  return { chain: await readFile(place('crt'), 'utf8'), key: await readFile(place('key'), 'utf8') };
}
