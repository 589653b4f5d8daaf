/**
 * A certificate authority and the certificates that it signs, made with the openssl command, under the file names that nbdkit,
 * libnbd and qemu expect. Owns nothing: the files are in the caller's directory.
 */
import fs from 'node:fs';
import path from 'node:path';
import { run } from './daemon.js';

async function openssl(...args: string[]): Promise<void> {
  const result = await run('openssl', args);
  if (result.code !== 0) throw new Error(`openssl ${args.join(' ')}: ${result.stderr}`);
}

export interface Signed {
  readonly key: string;
  readonly cert: string;
}

/** PEM files of an authority and its certificates, in `directory`. */
export class Authority {
  readonly cert: string;
  readonly #key: string;

  private constructor(readonly directory: string) {
    fs.mkdirSync(directory, { recursive: true });
    this.cert = path.join(directory, 'ca-cert.pem');
    this.#key = path.join(directory, 'ca-key.pem');
  }

  static async make(directory: string, name = 'test authority'): Promise<Authority> {
    const authority = new Authority(directory);
    const subject = ['-subj', `/CN=${name}`, '-days', '30'];
    const extensions = ['-addext', 'keyUsage=critical,keyCertSign,cRLSign'];
    await openssl(
      ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', ...subject, ...extensions],
      ...['-keyout', authority.#key, '-out', authority.cert],
    );
    return authority;
  }

  /** Write the list of revoked certificates, with these on it, to `file`. */
  async revoke(certificates: readonly string[], file: string): Promise<void> {
    const place = (name: string): string => path.join(this.directory, name);
    fs.writeFileSync(place('index.txt'), '');
    fs.writeFileSync(place('crlnumber'), '01\n');
    fs.writeFileSync(
      place('ca.conf'),
      `[ca]\ndefault_ca=one\n[one]\ndatabase=${place('index.txt')}\ncrlnumber=${place('crlnumber')}\n` +
        `default_md=sha256\ndefault_crl_days=30\n`,
    );
    const ca = ['ca', '-config', place('ca.conf'), '-keyfile', this.#key, '-cert', this.cert];
    for (const certificate of certificates) await openssl(...ca, '-revoke', certificate);
    await openssl(...ca, '-gencrl', '-out', file);
  }

  /** `directory`/`role`-cert.pem and -key.pem beside a copy of ca-cert.pem. */
  async sign(role: 'server' | 'client', commonName: string, directory: string, names = ''): Promise<Signed> {
    fs.mkdirSync(directory, { recursive: true });
    const key = path.join(directory, `${role}-key.pem`);
    const cert = path.join(directory, `${role}-cert.pem`);
    const request = path.join(directory, `${role}.csr`);
    const extensions = path.join(directory, `${role}.ext`);
    fs.writeFileSync(
      extensions,
      `basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=${role}Auth\n` +
        (names === '' ? '' : `subjectAltName=${names}\n`),
    );
    await openssl(
      ...['req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-subj', `/CN=${commonName}`],
      ...['-keyout', key, '-out', request],
    );
    await openssl(
      ...['x509', '-req', '-in', request, '-CA', this.cert, '-CAkey', this.#key, '-CAcreateserial', '-days', '30'],
      ...['-extfile', extensions, '-out', cert],
    );
    const copy = path.join(directory, 'ca-cert.pem');
    if (copy !== this.cert) fs.copyFileSync(this.cert, copy);
    return { key, cert };
  }
}
