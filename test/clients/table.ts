/**
 * A reporter of vitest that prints, at the end of a run, a Markdown table of the tested client programs, their versions and
 * results. With SHEEPGATE_CLIENTS_TABLE=FILE it writes the table between the marks in that file (`npm run clients-table`
 * does so for docs/clients.md). Owns only the table.
 */
import fs from 'node:fs';
import type { Reporter, TestCase, TestModule } from 'vitest/node';
import { clientSetNamed, releaseOf, SUITES, versionsOf } from '../harness/client-set.js';

/** In the order of the columns. */
const SETS = ['own', ...Object.keys(SUITES)];
const BEGIN = '<!-- clients: begin -->';
const END = '<!-- clients: end -->';

/** Programs of one package, and the program whose version stands for all of them. */
const ROWS: readonly { readonly label: string; readonly programs: readonly string[]; readonly version: string }[] = [
  {
    label: 'qemu-img, qemu-io, qemu-storage-daemon',
    programs: ['qemu-img', 'qemu-io', 'qemu-storage-daemon'],
    version: 'qemu-img',
  },
  { label: 'qemu, for the disk of a guest', programs: ['qemu-system-x86_64'], version: 'qemu-system-x86_64' },
  {
    label: "libnbd: nbdcopy, nbdinfo, nbdfuse, Python's nbd",
    programs: ['nbdcopy', 'nbdinfo', 'nbdfuse', 'nbdsh'],
    version: 'nbdcopy',
  },
  { label: "nbdkit's nbd plugin", programs: ['nbdkit'], version: 'nbdkit' },
  { label: 'fio, its nbd engine', programs: ['fio'], version: 'fio' },
  { label: 'virtnbdbackup, its reading of extents', programs: ['virtnbdbackup'], version: 'virtnbdbackup' },
  { label: 'Linux, its nbd driver', programs: ['linux'], version: 'linux' },
  { label: 'nbd-client', programs: ['nbd-client'], version: 'nbd-client' },
];

interface Tally {
  passed: number;
  skipped: number;
  readonly failed: string[];
}

export default class ClientsTable implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    const tests = modules.flatMap((module) => [...module.children.allTests()]);
    const tried = tests.filter((test) => test.meta().tried !== undefined);
    const sets = SETS.filter((name) => tried.some((test) => test.project.name === name));
    if (sets.length === 0) return;
    const table = tableOf(tried, sets);
    console.log(`\n${table}`);
    const file = process.env.SHEEPGATE_CLIENTS_TABLE;
    if (file) writeInto(file, table);
  }
}

function tableOf(tests: readonly TestCase[], sets: readonly string[]): string {
  const versions = new Map<string, Readonly<Record<string, string>>>();
  for (const name of sets) {
    const found = tests.filter((test) => test.project.name === name).map((test) => test.meta().versions ?? {});
    versions.set(name, Object.assign({}, versionsOf(clientSetNamed(name)), ...found) as Record<string, string>);
  }
  const lines = [
    ['client', ...sets.map((name) => releaseOf(clientSetNamed(name)).replace(/^Debian GNU\/Linux /, 'Debian '))],
    ['---', ...sets.map(() => '---')],
    ...ROWS.map(({ label, programs, version }) => [
      label,
      ...sets.map((name) => cell(versions.get(name)?.[version], tallyOf(tests, name, programs))),
    ]),
  ];
  return lines.map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}

function tallyOf(tests: readonly TestCase[], set: string, programs: readonly string[]): Tally {
  const tally: Tally = { passed: 0, skipped: 0, failed: [] };
  for (const test of tests) {
    const { tried = [] } = test.meta();
    if (test.project.name !== set || !tried.some((program) => programs.includes(program))) continue;
    const { state } = test.result();
    if (state === 'passed') tally.passed++;
    else if (state === 'failed') tally.failed.push(test.name);
    else tally.skipped++;
  }
  return tally;
}

function cell(version: string | undefined, { passed, skipped, failed }: Tally): string {
  if (passed + failed.length === 0) return 'not tried';
  const parts = [`${passed} of ${passed + failed.length} tests pass`];
  if (skipped > 0) parts.push(`${skipped} need what it lacks`);
  if (failed.length > 0) parts.push(`not: ${failed.join('; ')}`);
  return `${version ?? 'version unknown'}: ${parts.join(', ')}`;
}

function writeInto(file: string, table: string): void {
  const text = fs.readFileSync(file, 'utf8');
  const begin = text.indexOf(BEGIN);
  const end = text.indexOf(END);
  if (begin < 0 || end < begin) throw new Error(`${file} has no ${BEGIN} … ${END}`);
  fs.writeFileSync(file, `${text.slice(0, begin + BEGIN.length)}\n\n${table}\n\n${text.slice(end)}`);
  console.log(`written into ${file}`);
}
