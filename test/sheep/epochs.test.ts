/** Which epochs of nodes are believed: if answers come out of order, and while some nodes do not answer. */
import net from 'node:net';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { NodeConnection, type Answer, type Peer, type WireRequest } from '../../src/store/sheep/connection.js';
import { Opcode, Result } from '../../src/sheepdog/protocol.js';
import { RecoveryWatch } from '../../src/store/sheep/recovery-watch.js';
import { encodeVdiRequest } from '../../src/sheepdog/headers.js';
import type { ClusterNode } from '../../src/sheepdog/nodes.js';

const HEADER_BYTES = 48;

const nodeAt = (zone: number): ClusterNode =>
  ({ host: '127.0.0.1', port: 7000 + zone, vnodes: 128, zone }) as ClusterNode;

/** Three nodes. */
class Nodes {
  epoch = 1;
  /** Nodes leave requests unanswered. */
  readonly silent = new Set<number>();
  readonly recovering = new Set<number>();
  looks = 0;
  readonly #nodes = [nodeAt(0), nodeAt(1), nodeAt(2)];

  members(): Promise<{ epoch: number; nodes: ClusterNode[] }> {
    this.looks++;
    return Promise.resolve({ epoch: this.epoch, nodes: this.#nodes });
  }

  askEach(nodes: readonly ClusterNode[], requests: readonly WireRequest[]): Promise<(Answer | undefined)[]> {
    const answers = nodes.map(({ zone }, n) => {
      if (this.silent.has(zone)) return undefined;
      requests[n]?.receive?.fill(this.recovering.has(zone) ? 1 : 0);
      return { result: Result.SUCCESS, epoch: this.epoch, length: 0, header: Buffer.alloc(HEADER_BYTES) };
    });
    return Promise.resolve(answers);
  }

  execute(): Promise<Answer> {
    return Promise.reject(new Error('nothing is asked'));
  }
}

describe('a later epoch than that of the members', () => {
  let nodes: Nodes;
  let watch: RecoveryWatch;

  beforeEach(async () => {
    vi.useFakeTimers();
    nodes = new Nodes();
    nodes.epoch = 9;
    watch = new RecoveryWatch(nodes);
    watch.saw(9);
    await vi.advanceTimersByTimeAsync(1_000);
    nodes.epoch = 1;
  });

  afterEach(() => {
    watch.close();
    vi.useRealTimers();
  });

  test('is given up after some looks if all members answer', async () => {
    watch.saw(1);
    await vi.advanceTimersByTimeAsync(1_000);
    expect(watch.epoch).toBe(9);
    await vi.advanceTimersByTimeAsync(2_000);
    expect(watch.epoch).toBe(1);
  });

  test.each([
    ['one member does not answer', [1]],
    ['members can only be reached through an address that they do not know', [0, 1, 2]],
  ])('is given up later, but before the time for repeating requests is over, if %s', async (_, silent) => {
    for (const zone of silent) nodes.silent.add(zone);
    watch.saw(1);
    await vi.advanceTimersByTimeAsync(10_000);
    expect(watch.epoch).toBe(9);
    await vi.advanceTimersByTimeAsync(20_000);
    expect(watch.epoch).toBe(1);
  });

  test('is kept while any member says it', async () => {
    nodes.askEach = (asked) =>
      Promise.resolve(
        asked.map(({ zone }) => ({
          ...{ result: Result.SUCCESS, epoch: zone === 2 ? 9 : 1, length: 0, header: Buffer.alloc(HEADER_BYTES) },
        })),
      );
    watch.saw(1);
    await vi.advanceTimersByTimeAsync(120_000);
    expect(watch.epoch).toBe(9);
  });

  test('that was just seen is not given up because no node answers', async () => {
    nodes.epoch = 9;
    nodes.recovering.add(0);
    watch.saw(10);
    nodes.epoch = 10;
    await vi.advanceTimersByTimeAsync(1_000);
    watch.saw(11);
    nodes.members = () => Promise.reject(new Error('they are all gone'));
    await vi.advanceTimersByTimeAsync(120_000);
    expect(watch.epoch).toBe(11);
  });
});

test('a change seen just before a watch would end starts its looks again', async () => {
  vi.useFakeTimers();
  const nodes = new Nodes();
  const watch = new RecoveryWatch(nodes);
  watch.saw(1);
  nodes.epoch = 2;
  watch.saw(2);
  // The next look would be the last one.
  await vi.advanceTimersByTimeAsync(300);
  expect(watch.isSteady).toBe(false);
  nodes.epoch = 3;
  watch.saw(3);
  const { looks } = nodes;
  while (!watch.isSteady) await vi.advanceTimersByTimeAsync(10);
  expect(nodes.looks - looks).toBe(3);
  watch.close();
  vi.useRealTimers();
});

test('an old answer that arrives last, on another connection, sets the epoch of its node back for a moment only', async () => {
  const epochs: number[] = [];
  const server = net.createServer((socket) => {
    socket.on('data', (asked) => {
      const answer = Buffer.alloc(HEADER_BYTES);
      asked.copy(answer, 0, 0, 12);
      answer.writeUInt32LE(epochs.shift() as number, 4);
      socket.write(answer);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = { host: '127.0.0.1', port: (server.address() as net.AddressInfo).port };
  const [first, second] = await Promise.all([0, 1].map(() => NodeConnection.connect(address, () => undefined)));
  const peer: Peer = { epoch: 0, knowsVids: false };
  for (const connection of [first, second]) connection?.watchEpoch(peer, () => undefined);
  const ask = async (connection: NodeConnection | undefined, epoch: number): Promise<number> => {
    epochs.push(epoch);
    await connection?.send({ header: encodeVdiRequest(Opcode.GET_NODE_LIST, 0, 0) }, 1_000);
    return peer.epoch;
  };
  await ask(first, 7);
  await ask(second, 6);
  expect(await ask(first, 7)).toBe(7);
  for (const connection of [first, second]) connection?.destroy();
  await new Promise((resolve) => server.close(resolve));
});
