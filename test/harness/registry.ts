/**
 * A package registry on loopback that offers the packages in node_modules/, and no others: for an installation as on a machine
 * with only the network. It packs a package on request, and records the requests.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';

const MODULES = path.resolve(import.meta.dirname, '../../node_modules');
/** Path of a package's file, below its name. */
const TARBALL = '/-/package.tgz';

export interface Registry {
  /** For npm's `registry` setting. */
  readonly url: string;
  /** The requested packages, present or not. */
  asked(): string[];
  close(): Promise<void>;
}

export async function startRegistry(): Promise<Registry> {
  const names = new Set<string>();
  const server = http.createServer((request, response) => {
    const wanted = decodeURIComponent(new URL(request.url ?? '/', url).pathname.slice(1));
    const isTarball = wanted.endsWith(TARBALL);
    const name = isTarball ? wanted.slice(0, -TARBALL.length) : wanted;
    names.add(name);
    const directory = path.join(MODULES, name);
    const isThere = fs.existsSync(path.join(directory, 'package.json')) && !fs.lstatSync(directory).isSymbolicLink();
    if (!isThere) response.writeHead(404).end('{}');
    else if (isTarball) pack(directory, response);
    else response.end(JSON.stringify(packument(directory, `${url}${name}${TARBALL}`)));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
  return {
    url,
    asked: () => [...names].sort(),
    close: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

function packument(directory: string, tarball: string): object {
  const manifest = JSON.parse(fs.readFileSync(path.join(directory, 'package.json'), 'utf8')) as {
    readonly name: string;
    readonly version: string;
    readonly scripts?: Readonly<Record<string, string>>;
  };
  const { name, version, scripts = {} } = manifest;
  const hasInstallScript = ['preinstall', 'install', 'postinstall'].some((script) => script in scripts);
  const versions = { [version]: { ...manifest, hasInstallScript, dist: { tarball } } };
  return { name, 'dist-tags': { latest: version }, versions };
}

function pack(directory: string, response: http.ServerResponse): void {
  // Not compressed, which npm accepts as well: compressing native libraries takes CPU time.
  const tar = spawn('tar', ['-c', '--transform', 's,^\\.,package,', '-C', directory, '.'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  tar.on('error', (error) => response.destroy(error));
  tar.stdout.pipe(response);
}
