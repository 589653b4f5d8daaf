/** Meta contexts: listing and selection in the handshake, and block status in the transmission phase. */

import { describe, expect, test } from 'vitest';
import { ALLOCATION_CONTEXT, DeviceError, ExportError, STATE_HOLE, STATE_ZERO, type ExtentSink } from '../src/index.js';
import { CMD, CMD_FLAG, INFO, NBD_ERRNO, OPT, REP, REPLY_TYPE, TRANSMISSION_FLAG } from '../src/protocol/wire.js';
import {
  errorOf,
  infoQuery,
  metaQueries,
  optionBytes,
  uint32,
  uint64,
  type Chunk,
  type OptionReply,
  type RawClient,
  type RequestFields,
} from './raw-client.js';
import { DISK_SIZE, Gate, TestExport } from './test-device.js';
import { startServer, until, type TestServer } from './test-server.js';

const KIB = 1024;
const LEVELS = ['structured', 'extended'] as const;
type Level = (typeof LEVELS)[number];

const ZERO_HOLE = STATE_HOLE | STATE_ZERO;
const CHANGED = 'x-test:changed';
const OTHER = 'x-test:dirty-bitmap:other';
const WIDE = 'x-wide:origin';

/** An export with additional contexts. */
function rich(): TestExport {
  return new TestExport('disk', { contexts: [ALLOCATION_CONTEXT, CHANGED, OTHER, WIDE], wideContexts: [WIDE] });
}

async function greeted(server: TestServer, option?: number): Promise<RawClient> {
  const client = await server.raw();
  await client.greet();
  if (option !== undefined) await client.option(option);
  return client;
}

const types = (replies: readonly OptionReply[]): number[] => replies.map(({ type }) => type);

/** The contexts in an answer, by name. */
function contextsIn(replies: readonly OptionReply[]): Map<string, number> {
  expect(replies.at(-1)?.type).toBe(REP.ACK);
  return new Map(
    replies.slice(0, -1).map(({ type, data }) => {
      expect(type).toBe(REP.META_CONTEXT);
      return [data.toString('utf8', 4), data.readUInt32BE(0)];
    }),
  );
}

function ask(client: RawClient, level: Level, fields: RequestFields, payload?: Buffer): void {
  if (level === 'extended') client.extendedRequest(fields, payload);
  else client.request(fields, payload);
}

interface Status {
  readonly id: number;
  /** Length and flags of each extent. */
  readonly extents: readonly (readonly [number, number])[];
}

/** Context and extents of a block status chunk. */
function statusOf({ kind, type, payload }: Chunk): Status {
  const isWide = kind === 'extended';
  expect(type).toBe(isWide ? REPLY_TYPE.BLOCK_STATUS_EXT : REPLY_TYPE.BLOCK_STATUS);
  const extents: [number, number][] = [];
  if (isWide) {
    expect(payload.length).toBe(8 + 16 * payload.readUInt32BE(4));
    for (let at = 8; at < payload.length; at += 16) {
      extents.push([Number(payload.readBigUInt64BE(at)), Number(payload.readBigUInt64BE(at + 8))]);
    }
  } else {
    expect((payload.length - 4) % 8).toBe(0);
    for (let at = 4; at < payload.length; at += 8)
      extents.push([payload.readUInt32BE(at), payload.readUInt32BE(at + 4)]);
  }
  expect(extents.length).toBeGreaterThan(0);
  return { id: payload.readUInt32BE(0), extents };
}

describe('LIST_META_CONTEXT', () => {
  const all = [ALLOCATION_CONTEXT, CHANGED, OTHER, WIDE];
  for (const { queries, expected } of [
    { queries: [], expected: all },
    { queries: ['base:'], expected: [ALLOCATION_CONTEXT] },
    { queries: [ALLOCATION_CONTEXT], expected: [ALLOCATION_CONTEXT] },
    { queries: ['base:nothing'], expected: [] },
    { queries: ['x-test:'], expected: [CHANGED, OTHER] },
    { queries: ['x-test:dirty-bitmap:'], expected: [OTHER] },
    { queries: ['x-test:dirty-bitmap'], expected: [] },
    { queries: ['x-nobody:', 'x-nobody:a', 'base:'], expected: [ALLOCATION_CONTEXT] },
    { queries: ['base:', ALLOCATION_CONTEXT, 'base:'], expected: [ALLOCATION_CONTEXT] },
    { queries: ['x-test:größe ☃'], expected: [] },
  ]) {
    test(`the queries ${JSON.stringify(queries)} list ${expected.length} contexts, each once, with id 0`, async () => {
      const client = await greeted(await startServer({ exports: [rich()] }), OPT.EXTENDED_HEADERS);
      const found = contextsIn(await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk', queries)));
      expect([...found.keys()]).toEqual(expected);
      expect([...found.values()].every((id) => id === 0)).toBe(true);
    });
  }

  test('without extended headers a context with flags of 64 bits is not listed', async () => {
    const client = await greeted(await startServer({ exports: [rich()] }), OPT.STRUCTURED_REPLY);
    const found = contextsIn(await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk')));
    expect([...found.keys()]).toEqual([ALLOCATION_CONTEXT, CHANGED, OTHER]);
  });

  test('an export without contexts lists none', async () => {
    const server = await startServer({ exports: [new TestExport('disk', { contexts: [] })] });
    const client = await greeted(server, OPT.STRUCTURED_REPLY);
    expect(types(await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk')))).toEqual([REP.ACK]);
    expect(types(await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', ['base:allocation'])))).toEqual([
      REP.ACK,
    ]);
  });

  test('listing opens no device and selects no context', async () => {
    const server = await startServer({ exports: [rich()] });
    const client = await greeted(server, OPT.STRUCTURED_REPLY);
    await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk', [ALLOCATION_CONTEXT]));
    expect(server.provider.opened).toBe(0);
    await client.option(OPT.GO, infoQuery('disk'));
    client.request({ type: CMD.BLOCK_STATUS, length: 4096 });
    expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EINVAL);
  });
});

describe('an export that does not list all its contexts', () => {
  /** Lists x-test:1 to x-test:3, and has every x-test:NUMBER. */
  async function manyServer(): Promise<TestServer> {
    const server = await startServer();
    const { provider } = server;
    const describeAll = provider.describe.bind(provider);
    provider.describe = (name: string, _peer?: unknown, contexts: readonly string[] = []) => {
      const { geometry, info } = describeAll(name);
      const asked = contexts.filter((context) => /^x-test:\d+$/.test(context));
      return {
        geometry: { ...geometry, contexts: [...new Set(['x-test:1', 'x-test:2', 'x-test:3', ...asked])] },
        info,
      };
    };
    return server;
  }

  test('returns an unlisted context if it is queried by name, when listing and when selecting', async () => {
    const client = await greeted(await manyServer(), OPT.STRUCTURED_REPLY);
    const listed = await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk', ['x-test:']));
    expect([...contextsIn(listed).keys()]).toEqual(['x-test:1', 'x-test:2', 'x-test:3']);
    const queries = ['x-test:4711', 'x-test:none', 'x-test:'];
    const found = contextsIn(await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk', queries.slice(0, 2))));
    expect([...found.keys()]).toEqual(['x-test:4711']);
    expect([...contextsIn(await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', queries))).keys()]).toEqual([
      'x-test:4711',
    ]);
    await client.option(OPT.GO, infoQuery('disk'));
    client.request({ type: CMD.BLOCK_STATUS, length: 4096 });
    expect(statusOf(await client.readChunk()).extents).toEqual([[4096, 0]]);
  });
});

describe('SET_META_CONTEXT', () => {
  test('selects exact names, each with its own id; wildcards and unknown names select no context', async () => {
    const client = await greeted(await startServer({ exports: [rich()] }), OPT.EXTENDED_HEADERS);
    const queries = ['base:', 'x-test:', 'x-nobody:x', 'base:nothing', WIDE, ALLOCATION_CONTEXT, CHANGED, CHANGED];
    const found = contextsIn(await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', queries)));
    expect([...found.keys()].sort()).toEqual([ALLOCATION_CONTEXT, CHANGED, WIDE].sort());
    expect(new Set(found.values()).size).toBe(3);
  });

  test('without a query selects no context', async () => {
    const client = await greeted(await startServer({ exports: [rich()] }), OPT.STRUCTURED_REPLY);
    expect(types(await client.option(OPT.SET_META_CONTEXT, metaQueries('disk')))).toEqual([REP.ACK]);
  });

  test('refuses a context with flags of 64 bits without extended headers, and says why', async () => {
    const client = await greeted(await startServer({ exports: [rich()] }), OPT.STRUCTURED_REPLY);
    const queries = metaQueries('disk', [ALLOCATION_CONTEXT, WIDE]);
    const [reply] = await client.option(OPT.SET_META_CONTEXT, queries);
    expect(reply).toMatchObject({ type: REP.ERR_EXT_HEADER_REQD });
    expect(reply?.data.toString()).toContain(WIDE);
    await client.option(OPT.EXTENDED_HEADERS);
    expect(contextsIn(await client.option(OPT.SET_META_CONTEXT, queries)).size).toBe(2);
  });

  test('answers TOO_BIG to more than 16 contexts', async () => {
    const contexts = Array.from({ length: 17 }, (_, i) => `x-test:${i}`);
    const client = await greeted(await startServer({ exports: [new TestExport('disk', { contexts })] }), 8);
    expect(types(await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', contexts)))).toEqual([REP.ERR_TOO_BIG]);
    const sixteen = metaQueries('disk', contexts.slice(0, 16));
    expect(contextsIn(await client.option(OPT.SET_META_CONTEXT, sixteen)).size).toBe(16);
  });

  /** Whether a block status is answered after these options and GO. */
  async function hasStatusAfter(
    server: TestServer,
    options: readonly (readonly [number, Buffer?])[],
    exportName = 'disk',
  ): Promise<boolean> {
    const client = await greeted(server);
    for (const [option, data] of options) await client.option(option, data);
    await client.option(OPT.GO, infoQuery(exportName));
    client.request({ type: CMD.BLOCK_STATUS, length: 4096 });
    return (await client.readChunk()).type === REPLY_TYPE.BLOCK_STATUS;
  }

  const structured = [OPT.STRUCTURED_REPLY] as const;
  const set = [OPT.SET_META_CONTEXT, metaQueries('disk', [ALLOCATION_CONTEXT])] as const;

  for (const { what, options, expected } of [
    { what: 'alone', options: [structured, set], expected: true },
    { what: 'then a failed one', options: [structured, set, [OPT.SET_META_CONTEXT, Buffer.of(1)]], expected: false },
    {
      what: 'then one without queries',
      options: [structured, set, [OPT.SET_META_CONTEXT, metaQueries('disk')]],
      expected: false,
    },
    {
      what: 'then one for another export',
      options: [structured, set, [OPT.SET_META_CONTEXT, metaQueries('other', [ALLOCATION_CONTEXT])]],
      expected: false,
    },
    {
      what: 'then one for a missing export',
      options: [structured, set, [OPT.SET_META_CONTEXT, metaQueries('nothing', [ALLOCATION_CONTEXT])]],
      expected: false,
    },
    {
      what: 'for another export, then for this one',
      options: [structured, [OPT.SET_META_CONTEXT, metaQueries('other', [ALLOCATION_CONTEXT])], set],
      expected: true,
    },
    {
      what: 'then LIST_META_CONTEXT',
      options: [structured, set, [OPT.LIST_META_CONTEXT, metaQueries('disk')]],
      expected: true,
    },
    {
      what: 'then a failed GO and INFO',
      options: [structured, set, [OPT.GO, infoQuery('nothing')], [OPT.INFO, infoQuery('other')]],
      expected: true,
    },
    { what: 'without structured replies', options: [set, structured], expected: false },
  ] as const) {
    test(`${what}: block status is ${expected ? 'answered' : 'EINVAL'} after GO`, async () => {
      const server = await startServer({ exports: [new TestExport('disk'), new TestExport('other')] });
      expect(await hasStatusAfter(server, options)).toBe(expected);
    });
  }

  test('contexts selected for one export are not selected for another', async () => {
    const server = await startServer({ exports: [new TestExport('disk'), new TestExport('other')] });
    expect(await hasStatusAfter(server, [structured, set], 'other')).toBe(false);
  });

  test('contexts are also selected after EXPORT_NAME of the same export', async () => {
    const client = await greeted(await startServer(), OPT.STRUCTURED_REPLY);
    await client.option(...set);
    client.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')));
    await client.read(10);
    client.request({ type: CMD.BLOCK_STATUS, length: 4096 });
    expect((await client.readChunk()).type).toBe(REPLY_TYPE.BLOCK_STATUS);
  });

  test('BLOCK_STATUS_PAYLOAD is announced with extended headers, once contexts are selected for the export', async () => {
    const server = await startServer({ exports: [new TestExport('disk'), new TestExport('other')] });
    const client = await greeted(server, OPT.STRUCTURED_REPLY);
    const isAnnounced = async (name: string): Promise<boolean> => {
      const [info] = await client.option(OPT.INFO, infoQuery(name));
      expect(info?.data.readUInt16BE(0)).toBe(INFO.EXPORT);
      return ((info?.data.readUInt16BE(10) ?? 0) & TRANSMISSION_FLAG.BLOCK_STATUS_PAYLOAD) !== 0;
    };
    await client.option(...set);
    expect(await isAnnounced('disk')).toBe(false);
    await client.option(OPT.EXTENDED_HEADERS);
    expect(await isAnnounced('disk')).toBe(true);
    expect(await isAnnounced('other')).toBe(false);
    await client.option(OPT.SET_META_CONTEXT, metaQueries('disk'));
    expect(await isAnnounced('disk')).toBe(false);
  });
});

for (const option of [OPT.LIST_META_CONTEXT, OPT.SET_META_CONTEXT]) {
  describe(`errors of ${option === OPT.SET_META_CONTEXT ? 'SET' : 'LIST'}_META_CONTEXT`, () => {
    const isSet = option === OPT.SET_META_CONTEXT;
    test(`before structured replies it is ${isSet ? 'INVALID' : 'answered'}`, async () => {
      const client = await greeted(await startServer());
      const replies = await client.option(option, metaQueries('disk', ['base:allocation']));
      expect(types(replies)).toEqual(isSet ? [REP.ERR_INVALID] : [REP.META_CONTEXT, REP.ACK]);
    });

    for (const query of ['base', ':allocation', '']) {
      test(`the query ${JSON.stringify(query)} without a namespace finds nothing, and other queries are answered`, async () => {
        const client = await greeted(await startServer(), OPT.STRUCTURED_REPLY);
        const queries = [query, 'base:allocation'];
        const [found, end] = await client.option(option, metaQueries('disk', queries));
        expect([found?.data.toString('latin1', 4), end?.type]).toEqual(['base:allocation', REP.ACK]);
        expect(types(await client.option(option, metaQueries('disk', [query])))).toEqual([REP.ACK]);
      });
    }

    test('a missing export is answered UNKNOWN, a refused one POLICY, with the message of the provider', async () => {
      const server = await startServer();
      const client = await greeted(server, OPT.STRUCTURED_REPLY);
      expect(types(await client.option(option, metaQueries('nothing')))).toEqual([REP.ERR_UNKNOWN]);
      server.provider.describe = () => {
        throw new ExportError('POLICY', 'not for you');
      };
      const [reply] = await client.option(option, metaQueries('disk'));
      expect([reply?.type, reply?.data.toString()]).toEqual([REP.ERR_POLICY, 'not for you']);
    });

    for (const { what, data } of [
      { what: 'no data', data: Buffer.alloc(0) },
      { what: 'a name longer than the data', data: uint32(100) },
      { what: 'no number of queries', data: Buffer.concat([uint32(4), Buffer.from('disk')]) },
      { what: 'more queries announced than there are', data: metaQueries('disk', ['base:'], 2) },
      { what: 'fewer queries announced than there are', data: metaQueries('disk', ['base:', 'base:'], 1) },
      { what: '4294967295 queries announced', data: metaQueries('disk', [], 0xffff_ffff) },
      {
        what: 'a query longer than the data',
        data: Buffer.concat([metaQueries('disk', [], 1), uint32(5), Buffer.from('base')]),
      },
      { what: 'a query of 4097 bytes', data: metaQueries('disk', [`x:${'a'.repeat(4095)}`]) },
      { what: 'a name of 4097 bytes', data: metaQueries('n'.repeat(4097)) },
      { what: 'a query that is not UTF-8', data: metaQueries('disk', [Buffer.from('x:\xff', 'latin1')]) },
      { what: 'a query with NUL', data: metaQueries('disk', ['x:\0']) },
    ]) {
      test(`${what} is INVALID, and the handshake continues`, async () => {
        const client = await greeted(await startServer(), OPT.STRUCTURED_REPLY);
        expect(types(await client.option(option, data))).toEqual([REP.ERR_INVALID]);
        expect((await client.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
      });
    }

    test('256 queries are accepted, 257 are TOO_BIG, and so is more data than the limit of an option', async () => {
      const client = await greeted(await startServer(), OPT.STRUCTURED_REPLY);
      const many = Array.from({ length: 257 }, () => 'x-many:');
      expect(types(await client.option(option, metaQueries('disk', many.slice(1))))).toEqual([REP.ACK]);
      expect(types(await client.option(option, metaQueries('disk', many)))).toEqual([REP.ERR_TOO_BIG]);
      const long = Array.from({ length: 20 }, () => `x:${'a'.repeat(4000)}`);
      expect(types(await client.option(option, metaQueries('disk', long)))).toEqual([REP.ERR_TOO_BIG]);
    });
  });
}

describe('geometries', () => {
  for (const geometry of [
    { contexts: ['allocation'] },
    { contexts: ['base:'] },
    { contexts: [':leaf'] },
    { contexts: ['na me:leaf'] },
    { contexts: ['x:\0'] },
    { contexts: [`x:${'a'.repeat(4095)}`] },
    { contexts: [CHANGED, CHANGED] },
    { contexts: [], wideContexts: [WIDE] },
  ]) {
    test(`a device with ${JSON.stringify(geometry).slice(0, 60)} is not served`, async () => {
      const server = await startServer({ exports: [new TestExport('disk', geometry)] });
      const client = await greeted(server, OPT.STRUCTURED_REPLY);
      expect(types(await client.option(OPT.GO, infoQuery('disk')))).toEqual([REP.ERR_UNKNOWN]);
      expect(types(await client.option(OPT.LIST_META_CONTEXT, metaQueries('disk')))).toEqual([REP.ERR_UNKNOWN]);
      expect(server.deviceErrors).toHaveLength(2);
    });
  }
});

for (const level of LEVELS) {
  describe(`BLOCK_STATUS with ${level} replies`, () => {
    async function opened(server: TestServer, contexts: readonly string[] = [ALLOCATION_CONTEXT]): Promise<RawClient> {
      const client = await server.raw();
      await client.openWith(level, 'disk', contexts);
      return client;
    }

    async function status(client: RawClient, fields: Omit<RequestFields, 'type'>): Promise<Status[]> {
      ask(client, level, { type: CMD.BLOCK_STATUS, ...fields });
      return (await client.readChunks()).map(statusOf);
    }

    function disk(...holes: readonly [number, number][]): TestExport {
      const exported = new TestExport('disk');
      for (const [offset, length] of holes) exported.disk.fill(0, offset, offset + length);
      return exported;
    }

    test('neighbouring extents with the same flags are joined, and no data is read', async () => {
      const server = await startServer({ exports: [disk([0, 64 * KIB], [100 * KIB, 4 * KIB])] });
      const client = await opened(server);
      for (const delay of [undefined, Promise.resolve()]) {
        server.provider.hook = () => delay;
        const [answer, ...others] = await status(client, { offset: 0, length: DISK_SIZE, cookie: 4n });
        expect(others).toEqual([]);
        expect(answer?.extents).toEqual([
          [64 * KIB, ZERO_HOLE],
          [36 * KIB, 0],
          [4 * KIB, ZERO_HOLE],
          [920 * KIB, 0],
        ]);
      }
      expect(server.provider.calls.every(({ method }) => method === 'extents')).toBe(true);
    });

    test('a query within extents is answered for its range only', async () => {
      const client = await opened(await startServer({ exports: [disk([64 * KIB, 64 * KIB])] }));
      const [answer] = await status(client, { offset: 60 * KIB + 1, length: 8 * KIB });
      expect(answer?.extents).toEqual([
        [4 * KIB - 1, 0],
        [4 * KIB + 1, ZERO_HOLE],
      ]);
    });

    test('REQ_ONE is one joined extent, no longer than the requested range', async () => {
      const client = await opened(await startServer({ exports: [disk([0, 64 * KIB])] }));
      const flags = CMD_FLAG.REQ_ONE;
      expect((await status(client, { length: DISK_SIZE, flags }))[0]?.extents).toEqual([[64 * KIB, ZERO_HOLE]]);
      expect((await status(client, { length: 100, flags }))[0]?.extents).toEqual([[100, ZERO_HOLE]]);
      expect((await status(client, { offset: 64 * KIB, length: 8192, flags }))[0]?.extents).toEqual([[8192, 0]]);
    });

    test('an extent of the device that reaches beyond the range is cut to it', async () => {
      const exported = new TestExport('disk');
      exported.extents = (_context, offset, _length, sink) => void sink(offset, 2 ** 52, 1);
      const client = await opened(await startServer({ exports: [exported] }));
      for (const flags of [0, CMD_FLAG.REQ_ONE]) {
        expect((await status(client, { offset: 512, length: 4096, flags }))[0]?.extents).toEqual([[4096, 1]]);
      }
    });

    test('every context is answered once, with its own flags', async () => {
      const exported = rich();
      exported.extents = (context, offset, length, sink) => {
        const flags = { [ALLOCATION_CONTEXT]: ZERO_HOLE, [CHANGED]: 0xffff_ffff, [OTHER]: 7 }[context] ?? 0;
        if (sink(offset, 4096, flags)) sink(offset + 4096, length - 4096, 0);
      };
      const server = await startServer({ exports: [exported] });
      const client = await server.raw();
      await client.greet();
      await client.option(level === 'extended' ? OPT.EXTENDED_HEADERS : OPT.STRUCTURED_REPLY);
      const ids = contextsIn(
        await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', [OTHER, ALLOCATION_CONTEXT, CHANGED])),
      );
      await client.option(OPT.GO, infoQuery('disk'));
      const answers = await status(client, { length: 8192 });
      expect(new Map(answers.map(({ id, extents }) => [id, extents[0]?.[1]]))).toEqual(
        new Map([
          [ids.get(ALLOCATION_CONTEXT), ZERO_HOLE],
          [ids.get(CHANGED), 0xffff_ffff],
          [ids.get(OTHER), 7],
        ]),
      );
      expect(server.provider.calls.map(({ context }) => context).sort()).toEqual(
        [ALLOCATION_CONTEXT, CHANGED, OTHER].sort(),
      );
    });

    /** Extents of `size` bytes each with alternating flags, in every context that has a size. */
    function striped(sizes: Readonly<Record<string, number>>): TestExport {
      const exported = rich();
      Object.assign(exported, { geometry: { ...exported.geometry, size: 2 ** 31 } });
      exported.extents = (context, offset, length, sink) => {
        const size = sizes[context] ?? length;
        for (let at = offset; at < offset + length;) {
          const index = Math.floor(at / size);
          const next = (index + 1) * size;
          if (!sink(at, next - at, index % 2)) return;
          at = next;
        }
      };
      return exported;
    }

    const bytesOf = ({ extents }: Status): number => extents.reduce((sum, [length]) => sum + length, 0);

    test('with REQ_ONE all contexts have one extent, as long as the shortest', async () => {
      const exported = striped({ [ALLOCATION_CONTEXT]: 12 * KIB, [CHANGED]: 4 * KIB, [OTHER]: 64 * KIB });
      const client = await opened(await startServer({ exports: [exported] }), [ALLOCATION_CONTEXT, CHANGED, OTHER]);
      const seen: [number, number][][] = [];
      for (let offset = 0; offset < 16 * KIB; offset += 4 * KIB) {
        const answers = await status(client, { offset, length: 1024 * KIB, flags: CMD_FLAG.REQ_ONE });
        seen.push(...answers.map(({ extents }) => extents as [number, number][]));
      }
      expect(seen.every((extents) => extents.length === 1 && extents[0]?.[0] === 4 * KIB)).toBe(true);
      expect(seen.map((extents) => extents[0]?.[1])).toEqual([0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0]);
    });

    test('where one context ends early, all others end as well, also within an extent', async () => {
      const exported = rich();
      exported.extents = (context, offset, length, sink) => {
        if (context !== CHANGED) sink(offset, length, 1);
        else if (sink(offset, 4 * KIB, 1)) sink(offset + 4 * KIB, 1 * KIB, 0);
      };
      const client = await opened(await startServer({ exports: [exported] }), [ALLOCATION_CONTEXT, CHANGED, OTHER]);
      const answers = await status(client, { offset: 512, length: 64 * KIB });
      expect(answers.map(({ extents }) => extents)).toEqual([
        [[5 * KIB, 1]],
        [
          [4 * KIB, 1],
          [1 * KIB, 0],
        ],
        [[5 * KIB, 1]],
      ]);
    });

    for (const sizes of <Record<string, number>[]>[
      { [ALLOCATION_CONTEXT]: 512, [CHANGED]: 2 ** 22 },
      { [ALLOCATION_CONTEXT]: 2 ** 22, [CHANGED]: 512 },
      { [ALLOCATION_CONTEXT]: 512, [CHANGED]: 512, [OTHER]: 4096 },
      { [ALLOCATION_CONTEXT]: 1536, [CHANGED]: 512 },
    ]) {
      test(`contexts with very many extents share one limit, and cover the same bytes: ${JSON.stringify(sizes)}`, async () => {
        const contexts = Object.keys(sizes);
        const client = await opened(await startServer({ exports: [striped(sizes)] }), contexts);
        let offset = 0;
        for (let round = 0; round < 3; round++) {
          const answers = await status(client, { offset, length: 2 ** 31 - offset });
          const count = answers.reduce((sum, { extents }) => sum + extents.length, 0);
          // One more extent of the finest context would exceed the limit, alone or together with the other contexts.
          expect(count).toBeGreaterThan(128 * KIB - contexts.length);
          expect(count).toBeLessThanOrEqual(128 * KIB);
          const covered = answers.map(bytesOf);
          expect(new Set(covered).size).toBe(1);
          expect(answers).toHaveLength(contexts.length);
          offset += covered[0] ?? 0;
        }
        expect(offset).toBeGreaterThan(2 ** 26);
      });
    }

    test('block status requests in flight are limited by the memory for their extents', async () => {
      const server = await startServer({ exports: [striped({ [ALLOCATION_CONTEXT]: 512 })] });
      const gate = new Gate();
      server.provider.hook = ({ method }) => (method === 'extents' ? gate.opened : undefined);
      const client = await opened(server);
      for (let n = 0; n < 40; n++) ask(client, level, { type: CMD.BLOCK_STATUS, length: 2 ** 31, cookie: BigInt(n) });
      await until(() => server.provider.calls.length >= 16, '16 of them have begun');
      await new Promise((resolve) => setImmediate(resolve));
      expect(server.server.connections.get(1)?.inFlight).toBe(16);
      gate.open();
      for (let n = 0; n < 40; n++) expect((await client.readChunk()).payload.length).toBeGreaterThan(2 ** 20);
    });

    test('a map with very many extents is answered in parts, which together are complete', async () => {
      const exported = new TestExport('disk', { size: 0 });
      Object.assign(exported, { geometry: { ...exported.geometry, size: 2 ** 31 } });
      exported.extents = (_context, offset, length, sink) => {
        for (let at = offset; at < offset + length; at += 512) if (!sink(at, 512, (at / 512) % 2)) return;
      };
      const client = await opened(await startServer({ exports: [exported] }));
      const [answer] = await status(client, { length: 2 ** 31 });
      expect(answer?.extents).toHaveLength(128 * KIB);
      const reached = answer?.extents.reduce((sum, [length]) => sum + length, 0) ?? 0;
      const [next] = await status(client, { offset: reached, length: 4096 });
      expect(next?.extents[0]).toEqual([512, 0]);
    });

    for (const [what, extents] of [
      ['reports nothing', () => undefined],
      ['begins elsewhere', (sink: ExtentSink) => void sink(512, 4096, 0)],
      ['reports an empty extent', (sink: ExtentSink) => void sink(0, 0, 0)],
      ['reports invalid flags', (sink: ExtentSink) => void sink(0, 4096, -1)],
      ['reports flags of more than 32 bits', (sink: ExtentSink) => void sink(0, 4096, 2 ** 32)],
      [
        'throws',
        () => {
          throw new Error('a bug');
        },
      ],
    ] as const) {
      test(`a device that ${what} is reported, the request fails with EIO, and the connection continues`, async () => {
        const exported = new TestExport('disk');
        exported.extents = (_context, _offset, _length, sink) => extents(sink);
        const server = await startServer({ exports: [exported] });
        const client = await opened(server);
        for (const delay of [undefined, Promise.resolve()]) {
          server.provider.hook = () => delay;
          ask(client, level, { type: CMD.BLOCK_STATUS, length: 8192 });
          const chunk = await client.readChunk();
          expect(chunk.isDone).toBe(true);
          expect(errorOf(chunk).errno).toBe(NBD_ERRNO.EIO);
        }
        expect(server.deviceErrors).toHaveLength(2);
        ask(client, level, { type: CMD.READ, length: 4 });
        expect((await client.readChunk()).payload.subarray(8)).toEqual(uint32(1));
      });
    }

    test('of a device whose extents become invalid, the valid ones before are sent', async () => {
      const exported = new TestExport('disk');
      exported.extents = (_context, offset, _length, sink) => {
        sink(offset, 4096, 1);
        sink(offset + 4096, 4096, 0);
        sink(offset, 4096, 1);
      };
      const client = await opened(await startServer({ exports: [exported] }));
      expect((await status(client, { length: DISK_SIZE }))[0]?.extents).toEqual([
        [4096, 1],
        [4096, 0],
      ]);
    });

    test('if one context fails, the reply is its error and nothing else', async () => {
      const exported = rich();
      exported.extents = (context, offset, length, sink) => {
        if (context === CHANGED) throw new DeviceError('EIO', 'the bitmap is lost', { offset: offset + 512 });
        sink(offset, length, 0);
      };
      const client = await opened(await startServer({ exports: [exported] }), [ALLOCATION_CONTEXT, CHANGED, OTHER]);
      ask(client, level, { type: CMD.BLOCK_STATUS, offset: 4096, length: 8192 });
      const [chunk, ...others] = await client.readChunks();
      expect(others).toEqual([]);
      expect(chunk?.type).toBe(REPLY_TYPE.ERROR_OFFSET);
      expect(chunk && errorOf(chunk)).toEqual({
        errno: NBD_ERRNO.EIO,
        message: 'the bitmap is lost',
        rest: uint64(4608),
      });
    });

    for (const { what, fields } of [
      { what: 'of length 0', fields: { offset: 0, length: 0 } },
      { what: 'beyond the end', fields: { offset: DISK_SIZE - 1, length: 2 } },
      { what: 'with NO_HOLE', fields: { length: 4096, flags: CMD_FLAG.NO_HOLE } },
      { what: 'with DF', fields: { length: 4096, flags: CMD_FLAG.DF } },
      { what: 'with an unknown flag', fields: { length: 4096, flags: 0x8000 } },
    ]) {
      test(`a block status ${what} is EINVAL`, async () => {
        const server = await startServer();
        const client = await opened(server);
        ask(client, level, { type: CMD.BLOCK_STATUS, ...fields });
        expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EINVAL);
        expect(server.provider.calls).toEqual([]);
      });
    }

    test('an unaligned block status of a device with a minimum block size is EINVAL', async () => {
      const server = await startServer({ exports: [new TestExport('disk', { minimumBlockSize: 4096 })] });
      const client = await opened(server);
      ask(client, level, { type: CMD.BLOCK_STATUS, offset: 512, length: 4096 });
      expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EINVAL);
    });

    test('a slow block status delays no other request, and a connection lost meanwhile leaves no device open', async () => {
      const server = await startServer();
      const gate = new Gate();
      server.provider.hook = ({ method }) => (method === 'extents' ? gate.opened : undefined);
      const client = await opened(server);
      ask(client, level, { type: CMD.BLOCK_STATUS, length: 4096, cookie: 1n });
      ask(client, level, { type: CMD.READ, length: 4, cookie: 2n });
      expect((await client.readChunk()).cookie).toBe(2n);
      expect(server.server.connections.get(1)?.inFlight).toBe(1);
      client.vanish();
      gate.open();
      await server.allOver();
    });
  });
}

describe('BLOCK_STATUS with a payload', () => {
  async function opened(server: TestServer): Promise<{ client: RawClient; ids: Map<string, number> }> {
    const client = await server.raw();
    await client.greet();
    await client.option(OPT.EXTENDED_HEADERS);
    const names = [ALLOCATION_CONTEXT, CHANGED, WIDE];
    const ids = contextsIn(await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', names)));
    await client.option(OPT.GO, infoQuery('disk'));
    return { client, ids };
  }

  const filter = (length: number | bigint, ids: readonly number[]): Buffer =>
    Buffer.concat([uint64(length), ...ids.map(uint32)]);

  test('is answered for the contexts in it only, and for the length in it', async () => {
    const server = await startServer({ exports: [rich()] });
    const { client, ids } = await opened(server);
    const [changed, wide] = [ids.get(CHANGED) ?? 0, ids.get(WIDE) ?? 0];
    for (const wanted of [[changed], [wide, changed]]) {
      client.extendedRequest({ type: CMD.BLOCK_STATUS, offset: 4096 }, filter(8192, wanted));
      const answers = (await client.readChunks()).map(statusOf);
      expect(answers.map(({ id }) => id).sort()).toEqual(wanted.toSorted());
      for (const { extents } of answers) expect(extents).toEqual([[8192, 0]]);
    }
    expect(server.provider.calls.every(({ offset, length }) => offset === 4096 && length === 8192)).toBe(true);
  });

  test('may arrive in pieces, between other requests', async () => {
    const { client, ids } = await opened(await startServer({ exports: [rich()] }));
    const bytes = filter(4096, [ids.get(CHANGED) ?? 0]);
    client.extendedRequest({ type: CMD.READ, length: 4, cookie: 1n });
    client.extendedRequest({ type: CMD.BLOCK_STATUS, flags: CMD_FLAG.PAYLOAD_LEN, length: bytes.length, cookie: 2n });
    expect((await client.readChunk()).cookie).toBe(1n);
    for (const byte of bytes) await new Promise((resolve) => client.socket.write(Buffer.of(byte), resolve));
    expect((await client.readChunk()).cookie).toBe(2n);
  });

  test('is answered with flags of more than 32 bits', async () => {
    const exported = rich();
    exported.extents = (context, offset, length, sink) => void sink(offset, length, context === WIDE ? 2 ** 53 - 1 : 0);
    const { client, ids } = await opened(await startServer({ exports: [exported] }));
    client.extendedRequest({ type: CMD.BLOCK_STATUS }, filter(4096, [ids.get(WIDE) ?? 0]));
    const [chunk] = await client.readChunks();
    expect(chunk && statusOf(chunk).extents).toEqual([[4096, 2 ** 53 - 1]]);
  });

  for (const { what, payload } of [
    { what: 'no id', payload: () => filter(4096, []) },
    { what: 'an unknown id', payload: () => filter(4096, [0x7777]) },
    { what: 'an id twice', payload: (id: number) => filter(4096, [id, id]) },
    { what: 'more ids than contexts', payload: (id: number) => filter(4096, [id, id, id, id]) },
    { what: 'half an id', payload: (id: number) => filter(4096, [id]).subarray(0, 10) },
    { what: 'a length of 0', payload: (id: number) => filter(0, [id]) },
    { what: 'a length beyond the end', payload: (id: number) => filter(DISK_SIZE + 1, [id]) },
    { what: 'a length above 2^53', payload: (id: number) => filter(2n ** 64n - 1n, [id]) },
    { what: '70000 bytes', payload: () => Buffer.alloc(70_000) },
    { what: 'one byte', payload: () => Buffer.alloc(1) },
  ]) {
    test(`with ${what} is drained and answered EINVAL`, async () => {
      const server = await startServer({ exports: [rich()] });
      const { client, ids } = await opened(server);
      client.extendedRequest({ type: CMD.BLOCK_STATUS, cookie: 1n }, payload(ids.get(ALLOCATION_CONTEXT) ?? 0));
      const chunk = await client.readChunk();
      expect(chunk).toMatchObject({ cookie: 1n, isDone: true });
      expect(errorOf(chunk).errno).toBe(NBD_ERRNO.EINVAL);
      expect(server.provider.calls).toEqual([]);
      client.extendedRequest({ type: CMD.READ, length: 4, cookie: 2n });
      expect((await client.readChunk()).cookie).toBe(2n);
    });
  }
});
