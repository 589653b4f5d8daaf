/**
 * Findings of the deep check, in an operator's terms: which bytes of which disks, what is on which node. Owns the shape of the
 * report and its wording.
 */
import { oidText } from '../../../sheepdog/object-ids.js';
import { addressLabel } from '../cluster-address.js';
import { printOf, type Difference, type Look } from './look.js';
import { UNIT_BYTES, type Part, type Target } from './objects-in-use.js';
import type { ClusterNode } from '../../../sheepdog/nodes.js';

/** Ranges of one object in the report; ranges, and users, in one line. */
const MAX_RANGES = 64;
const MAX_TOLD_RANGES = 8;
const MAX_TOLD_USERS = 4;

/**
 * `different`: copies differ, or a strip does not match the others. `missing`: a node that should have a copy has none, others
 * have one. `lost`: no node has a copy, or too few strips are left to compute the data.
 */
export type FindingKind = 'different' | 'missing' | 'lost';

/** Nodes (HOST:PORT) that have the same content in a range. */
export interface Content {
  readonly nodes: readonly string[];
  readonly isZeros: boolean;
}

/** Bytes of the object, [from, to). */
export interface DifferentRange {
  readonly from: number;
  readonly to: number;
  /** Of copies only; empty for strips, which all differ. */
  readonly contents: readonly Content[];
  /** The wrong strip, where it can be determined, and its node. */
  readonly wrongStrip?: number;
  readonly wrongStripOn?: string;
}

/**
 * A disk or snapshot that the object belongs to, and the bytes, both included, that it has there; of inodes and indexes their
 * own bytes.
 */
export interface User {
  readonly label: string;
  readonly from: number;
  readonly to: number;
}

export interface Finding {
  readonly kind: FindingKind;
  readonly part: Part;
  /** As `dog` writes it. */
  readonly oid: string;
  readonly isErasureCoded: boolean;
  readonly users: User[];
  /** Their number; `users` may have fewer. */
  userCount: number;
  readonly ranges: readonly DifferentRange[];
  readonly rangeCount: number;
  readonly missingOn: readonly string[];
  readonly presentOn: readonly string[];
  /** Other answers than a copy or "no such object", with their nodes. */
  readonly trouble: readonly string[];
}

/** The findings about one object: copies are missing, or differ, or both. */
export function findingsOf(target: Target, look: Look): Finding[] {
  const { present, absent, differences } = look;
  const ranges = rangesOf(target, look);
  const of = {
    part: target.part,
    oid: oidText(target.high, target.low),
    isErasureCoded: target.dataStrips > 0,
    userCount: 0,
    presentOn: present.map(addressLabel),
    missingOn: absent.map(({ node }) => addressLabel(node)),
    trouble: absent.flatMap(({ node, trouble }) => (trouble ? [`${addressLabel(node)}: ${trouble}`] : [])),
  };
  const isLost = present.length < Math.max(1, target.dataStrips);
  const found: Finding[] = [];
  if (absent.length > 0) {
    found.push({ ...of, kind: isLost ? 'lost' : 'missing', users: [], ranges: [], rangeCount: 0 });
  }
  if (differences.length > 0 && !isLost) {
    const told = ranges.slice(0, MAX_RANGES);
    found.push({ ...of, kind: 'different', users: [], ranges: told, rangeCount: ranges.length });
  }
  return found;
}

/** Joins neighbouring units in which the same groups of nodes agree. */
function rangesOf(target: Target, { present, differences }: Look): DifferentRange[] {
  const ranges: { from: number; to: number; key: string; difference: Difference }[] = [];
  const end = target.copyBytes * Math.max(1, target.dataStrips);
  for (const difference of differences) {
    const { unit, wrong } = difference;
    const key = target.dataStrips > 0 ? String(wrong) : groupsOf(present, difference).join();
    const from = unit * UNIT_BYTES;
    const to = Math.min(from + UNIT_BYTES, end);
    const last = ranges.at(-1);
    if (last && last.to === from && last.key === key) last.to = to;
    else ranges.push({ from, to, key, difference });
  }
  return ranges.map(({ from, to, difference }) => {
    if (target.dataStrips === 0) return { from, to, contents: contentsOf(present, difference) };
    const wrong = present[difference.wrong];
    if (!wrong) return { from, to, contents: [] };
    return { from, to, contents: [], wrongStrip: difference.wrongStrip, wrongStripOn: addressLabel(wrong) };
  });
}

/** For each node: the first node with the same content, -1 for zeros. */
function groupsOf(present: readonly ClusterNode[], difference: Difference): number[] {
  const prints = present.map((_, n) => printOf(difference, n));
  return prints.map((print) => (print === '' ? -1 : prints.indexOf(print)));
}

function contentsOf(present: readonly ClusterNode[], difference: Difference): Content[] {
  const groups = groupsOf(present, difference);
  return [...new Set(groups)].map((group) => ({
    nodes: present.filter((_, n) => groups[n] === group).map(addressLabel),
    isZeros: group === -1,
  }));
}

/** One line, without a newline. */
export function describe(finding: Finding): string {
  const where = usersOf(finding);
  const object = `(object ${finding.oid})`;
  const what = finding.isErasureCoded ? 'strip' : 'copy';
  switch (finding.kind) {
    case 'lost':
      return finding.presentOn.length === 0
        ? `lost: ${where}: no node has it ${object}${troubleOf(finding)}`
        : `lost: ${where}: too few strips are left, on ${finding.presentOn.join(', ')} ${object}${troubleOf(finding)}`;
    case 'missing':
      return (
        `degraded: ${where}: no ${what} on ${finding.missingOn.join(', ')}, only on ${finding.presentOn.join(', ')} ` +
        `${object}${troubleOf(finding)}`
      );
    case 'different': {
      const told = finding.ranges.slice(0, MAX_TOLD_RANGES).map((range) => describeRange(finding, range));
      const more = finding.rangeCount - told.length;
      return `different: ${where}: ${told.join('; ')}${more > 0 ? `; and ${more} more ranges` : ''} ${object}`;
    }
  }
}

/** A VDI or snapshot that should have more copies than there are zones. */
export interface Thin {
  readonly label: string;
  readonly copies: number;
  readonly zones: number;
}

/** One line for each number of copies. */
export function describeThin(thin: readonly Thin[]): string[] {
  return [...new Set(thin.map(({ copies }) => copies))].map((copies) => {
    const all = thin.filter((each) => each.copies === copies);
    const labels = all.slice(0, MAX_TOLD_USERS).map(({ label }) => label);
    const more = all.length - labels.length;
    const { zones } = all[0] as Thin;
    return (
      `degraded: all of ${labels.join(', ')}${more > 0 ? ` and ${more} more` : ''}: ${copies} copies or strips are wanted, ` +
      `and the cluster has nodes in ${zones} ${zones === 1 ? 'zone' : 'zones'} only`
    );
  });
}

function describeRange(finding: Finding, range: DifferentRange): string {
  const of = finding.part === 'data' ? finding.users[0] : undefined;
  const base = of ? of.from : 0;
  const bytes = `bytes ${base + range.from} to ${base + range.to - 1}`;
  if (finding.isErasureCoded) {
    return range.wrongStripOn === undefined
      ? `${bytes} the strips do not fit each other`
      : `${bytes} strip ${range.wrongStrip}, on ${range.wrongStripOn}, does not fit the others`;
  }
  const contents = range.contents.map(({ nodes, isZeros }) => (isZeros ? 'zeros on ' : '') + nodes.join(' and '));
  return `${bytes} are not the same: ${contents.join(' | ')}`;
}

function usersOf({ part, kind, users, userCount }: Finding): string {
  const told = users.slice(0, MAX_TOLD_USERS).map(({ label, from, to }) => {
    if (part === 'inode') return `the inode of ${label}`;
    if (part === 'index') return `the index of ${label}`;
    return kind === 'different' ? label : `${label} bytes ${from} to ${to}`;
  });
  const more = userCount - told.length;
  return `${told.join(', ')}${more > 0 ? ` and ${more} more` : ''}`;
}

function troubleOf({ trouble }: Finding): string {
  return trouble.length > 0 ? `; ${trouble.join('; ')}` : '';
}
