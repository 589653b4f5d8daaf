/**
 * One look at an object on all nodes that should have it: which of them have it, and in which units their copies differ or
 * their strips do not match. Owns the buffers for that, one piece of each copy at a time. A difference may be a write that has
 * reached one node and not yet another; suspects.ts finds out whether it lasts.
 */
import { createHash } from 'node:crypto';
import { MAX_PIECE_BYTES } from '../pieces.js';
import { StripComparison } from '../../../sheepdog/erasure-code.js';
import { UNIT_BYTES, type Target } from './objects-in-use.js';
import { MembersChanged, type Peers, type View } from './peers.js';
import type { Throttle } from './throttle.js';
import type { ClusterNode } from '../../../sheepdog/nodes.js';

/** A print: a hash of the content of a unit, to compare two looks; 0 for zeros. */
const PRINT_BYTES = 8;
/** Units nearer to each other than this are read with one request. */
const NEAR_UNITS = 64;
const ZERO_UNIT = Buffer.alloc(UNIT_BYTES);

/** Why a node's copy is not there. */
export interface Absence {
  readonly node: ClusterNode;
  readonly trouble?: string | undefined;
}

/** A unit that differs. */
export interface Difference {
  readonly unit: number;
  /** PRINT_BYTES for each node that has a copy, in the order of `present`. */
  readonly prints: Buffer;
  /** Of an erasure-coded object: position in `present` of the node with the wrong strip, -1 if it cannot be determined. */
  readonly wrong: number;
  /** The number of that strip. */
  readonly wrongStrip: number;
}

export interface Look {
  readonly view: View;
  readonly present: readonly ClusterNode[];
  readonly absent: readonly Absence[];
  /** In ascending order. */
  readonly differences: readonly Difference[];
}

export interface Looking {
  readonly peers: Peers;
  readonly throttle: Throttle;
  /** Called with the number of bytes that were read. */
  readonly didRead: (bytes: number) => void;
}

/** A copy during a look. `position`: among all copies of the object, which is the number of its strip. */
interface Copy {
  readonly position: number;
  readonly node: ClusterNode;
  absence: Absence | undefined;
}

export class Looker {
  readonly #looking: Looking;
  /** Buffers that nobody uses. */
  readonly #spare: Buffer[] = [];

  constructor(looking: Looking) {
    this.#looking = looking;
  }

  /**
   * Looks at the whole object, or at these `units` of it, in ascending order. `fresh`: with the present members, none of them
   * recovering. Errors: IO (a node cannot be asked).
   */
  async look(target: Target, units?: readonly number[], { fresh = false } = {}): Promise<Look> {
    const { peers } = this.#looking;
    const spans = units ? spansOf(units) : target.spans;
    for (;;) {
      const view = await peers.view({ fresh });
      try {
        return await this.#lookBy(view, target, spans, units && new Set(units));
      } catch (error) {
        if (!(error instanceof MembersChanged)) throw error;
        peers.isOver(view);
      }
    }
  }

  async #lookBy(
    view: View,
    target: Target,
    spans: Target['spans'],
    wanted: ReadonlySet<number> | undefined,
  ): Promise<Look> {
    const holders = view.placement.holdersOf(target.high, target.low, target.copies);
    const copies = holders.map((at, position): Copy => {
      return { position, node: view.nodes[at] as ClusterNode, absence: undefined };
    });
    const differences: Difference[] = [];
    const unitsPerPiece = Math.floor(MAX_PIECE_BYTES / target.unitBytes);
    const found = (difference: Difference): void => {
      if (!wanted || wanted.has(difference.unit)) differences.push(difference);
    };
    for (const [from, to] of spans) {
      for (let unit = from; unit < to; unit += unitsPerPiece) {
        const isFirst = unit === spans[0]?.[0];
        const absentBefore = absentOf(copies);
        if (absentBefore === copies.length) break;
        await this.#comparePiece(view, target, copies, unit, Math.min(unit + unitsPerPiece, to), found);
        // A copy was removed meanwhile: the earlier pieces were compared with more nodes. Start again.
        if (!isFirst && absentOf(copies) !== absentBefore) return this.#lookBy(view, target, spans, wanted);
      }
    }
    return {
      view,
      present: copies.filter(({ absence }) => !absence).map(({ node }) => node),
      absent: copies.flatMap(({ absence }) => absence ?? []),
      differences,
    };
  }

  async #comparePiece(
    view: View,
    target: Target,
    copies: readonly Copy[],
    from: number,
    to: number,
    found: (difference: Difference) => void,
  ): Promise<void> {
    const { peers, throttle, didRead } = this.#looking;
    const { high, low, unitBytes, copyBytes, dataStrips } = target;
    const offset = from * unitBytes;
    const length = Math.min(to * unitBytes, copyBytes) - offset;
    const asked = copies.filter(({ absence }) => !absence);
    const buffers = asked.map(() => this.#spare.pop() ?? Buffer.allocUnsafeSlow(MAX_PIECE_BYTES));
    try {
      await throttle.take(length * asked.length);
      const reads = asked.map(async (copy, n) => {
        const into = (buffers[n] as Buffer).subarray(0, length);
        const strip = dataStrips === 0 ? 0 : copy.position;
        const answer = await peers.read(view, copy.node, { high, low, strip }, offset, into);
        if (answer.missing || answer.trouble) copy.absence = { node: copy.node, trouble: answer.trouble };
      });
      // Wait for all reads: their buffers are reused.
      for (const result of await Promise.allSettled(reads)) if (result.status === 'rejected') throw result.reason;
      didRead(length * asked.length);
      const parts = asked.flatMap(({ absence }, n) => (absence ? [] : [(buffers[n] as Buffer).subarray(0, length)]));
      const present = asked.filter(({ absence }) => !absence);
      if (dataStrips === 0) compareCopies(parts, from, found);
      else compareStrips(parts, present, target, from, found);
    } finally {
      this.#spare.push(...buffers);
    }
  }
}

function absentOf(copies: readonly Copy[]): number {
  return copies.filter(({ absence }) => absence).length;
}

function compareCopies(parts: readonly Buffer[], from: number, found: (difference: Difference) => void): void {
  const [first, ...others] = parts;
  if (!first || others.every((other) => other.equals(first))) return;
  for (let at = 0, unit = from; at < first.length; at += UNIT_BYTES, unit++) {
    const to = Math.min(at + UNIT_BYTES, first.length);
    if (others.every((other) => other.compare(first, at, to, at, to) === 0)) continue;
    found({ unit, prints: printsOf(parts, at, to), wrong: -1, wrongStrip: -1 });
  }
}

function compareStrips(
  parts: readonly Buffer[],
  present: readonly Copy[],
  { dataStrips, unitBytes }: Target,
  from: number,
  found: (difference: Difference) => void,
): void {
  // No more strips than data needs: nothing to compare.
  if (parts.length <= dataStrips) return;
  const comparison = comparisonOf(
    dataStrips,
    present.map(({ position }) => position),
  );
  comparison.compare(parts, unitBytes, (stripe, wrongStrip) => {
    const at = stripe * unitBytes;
    const wrong = present.findIndex(({ position }) => position === wrongStrip);
    found({ unit: from + stripe, prints: printsOf(parts, at, at + unitBytes), wrong, wrongStrip });
  });
}

/** Kept, because making one takes longer than using it on a small object. */
const comparisons = new Map<string, StripComparison>();
const MAX_COMPARISONS = 64;

function comparisonOf(data: number, strips: readonly number[]): StripComparison {
  const key = `${data}:${strips.join()}`;
  let comparison = comparisons.get(key);
  if (!comparison) {
    if (comparisons.size >= MAX_COMPARISONS) comparisons.clear();
    comparison = new StripComparison(data, strips);
    comparisons.set(key, comparison);
  }
  return comparison;
}

function printsOf(parts: readonly Buffer[], from: number, to: number): Buffer {
  const prints = Buffer.alloc(parts.length * PRINT_BYTES);
  for (const [n, part] of parts.entries()) {
    if (part.compare(ZERO_UNIT, 0, to - from, from, to) === 0) continue;
    const hash = createHash('sha1').update(part.subarray(from, to)).digest();
    hash.copy(prints, n * PRINT_BYTES, 0, PRINT_BYTES);
  }
  return prints;
}

/** The print of the n-th copy, for comparison; empty for zeros. */
export function printOf({ prints }: Difference, n: number): string {
  const print = prints.subarray(n * PRINT_BYTES, (n + 1) * PRINT_BYTES);
  return print.every((byte) => byte === 0) ? '' : print.toString('hex');
}

function spansOf(units: readonly number[]): [number, number][] {
  const spans: [number, number][] = [];
  for (const unit of units) {
    const last = spans.at(-1);
    if (last && unit < last[1] + NEAR_UNITS) last[1] = unit + 1;
    else spans.push([unit, unit + 1]);
  }
  return spans;
}
