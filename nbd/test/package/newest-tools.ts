/**
 * The newest compilers, bundlers and runtimes of npm that users have, and that are too large to be installed with the
 * repository: kept in ~/.cache, each in a folder of its own. What cannot be installed or started here is reported and left out.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { run } from './packed-library.js';

const CACHE = path.join(
  process.env['XDG_CACHE_HOME'] ?? path.join(os.homedir(), '.cache'),
  'nbd-server-ts-newest-tools',
);

/** The packages of each tool; the first has the program, whose path in node_modules follows. */
const TOOLS = {
  typescript: { packages: ['typescript', '@types/node'], program: '.bin/tsc' },
  esbuild: { packages: ['esbuild'], program: '.bin/esbuild' },
  webpack: { packages: ['webpack'], program: 'webpack/bin/webpack.js' },
  node: { packages: ['node'], program: 'node/bin/node' },
  deno: { packages: ['deno'], program: '.bin/deno' },
  bun: { packages: ['bun'], program: '.bin/bun' },
};

export type ToolName = keyof typeof TOOLS;

export interface Tool {
  readonly version: string;
  readonly program: string;
  /** The folder of a package that was installed with it. */
  module(name: string): string;
}

/** Installs or updates all, at the same time; prints which versions there are, and why one is missing. */
export async function installTools(): Promise<ReadonlyMap<ToolName, Tool>> {
  const names = Object.keys(TOOLS) as ToolName[];
  const tools = new Map<ToolName, Tool>();
  const install = async (name: ToolName): Promise<void> => {
    try {
      tools.set(name, await installTool(name));
    } catch (error) {
      console.log(
        `skipped: the packed library with ${name}: ${error instanceof Error ? error.message : String(error)}`,
      );
    }
  };
  await Promise.all(names.map(install));
  console.log(`the newest: ${Array.from(tools, ([name, { version }]) => `${name} ${version}`).join(', ')}`);
  return tools;
}

async function installTool(name: ToolName): Promise<Tool> {
  const { packages, program } = TOOLS[name];
  const directory = path.join(CACHE, name);
  fs.mkdirSync(directory, { recursive: true });
  const newest = packages.map((each) => `${each}@latest`);
  const quiet = ['--no-save', '--no-audit', '--no-fund', '--loglevel=error'];
  const modules = path.join(directory, 'node_modules');
  const file = path.join(modules, program);
  try {
    await run('npm', ['install', '--prefix', directory, ...quiet, ...newest], { cwd: directory });
  } catch (error) {
    // Without a network, what an earlier run has fetched will do.
    if (!fs.existsSync(file)) throw error;
  }
  if (name !== 'webpack') await run(file, ['--version'], { cwd: directory });
  const { version } = JSON.parse(fs.readFileSync(path.join(modules, name, 'package.json'), 'utf8')) as {
    version: string;
  };
  return { version, program: file, module: (each) => path.join(modules, each) };
}
