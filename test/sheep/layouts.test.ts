/** Layouts, compared with bytes that real nodes have sent (record.mjs) and with each other. */
import fs from 'node:fs';
import { describe, expect, test } from 'vitest';
import { clusterLocation, parseClusterAddress } from '../../src/store/sheep/cluster-address.js';
import { HEADER_BYTES, Opcode, Result } from '../../src/sheepdog/protocol.js';
import { hash } from './stand-in.js';
import { decodeClusterInfo } from '../../src/sheepdog/cluster-info.js';
import {
  encodeObjectRequest,
  encodeVdiRequest,
  nodeResponse,
  objectRequest,
  vdiRequest,
  vdiResponse,
} from '../../src/sheepdog/headers.js';
import {
  decodeInode,
  encodeTime,
  inodeLayout,
  INODE_HEADER_BYTES,
  INODE_SNAP_CTIME_OFFSET,
  INODE_TAG_OFFSET,
  INODE_VDI_SIZE_OFFSET,
} from '../../src/sheepdog/inode.js';
import { decodeNodes } from '../../src/sheepdog/nodes.js';

interface Recorded {
  readonly label: string;
  readonly request: string;
  readonly response: string;
  readonly payloadLength: number;
  readonly payload: string;
}

const recorded = JSON.parse(fs.readFileSync(new URL('fixtures/node.json', import.meta.url), 'utf8')) as {
  name: string;
  size: number;
  records: Recorded[];
};

function find(label: string): { request: Buffer; response: Buffer; payload: Buffer; result: number } {
  const record = recorded.records.find((each) => each.label === label);
  if (!record) throw new Error(`nothing recorded as "${label}"`);
  const payload = Buffer.alloc(record.payloadLength);
  payload.write(record.payload, 'hex');
  const response = Buffer.from(record.response, 'hex');
  return { request: Buffer.from(record.request, 'hex'), response, payload, result: response.readUInt32LE(16) };
}

describe('bytes of real nodes', () => {
  const vid = vdiResponse.decode(find('new VDI').response).vid;
  const next = vdiResponse.decode(find('snapshot').response).vid;

  test('the vid follows from the name, and the working VDI after a snapshot has the next vid', () => {
    expect(vid).toBe(hash(recorded.name));
    expect(next).toBe(vid + 1);
    expect(vdiResponse.decode(find('lookup').response).vid).toBe(next);
    expect(find('lookup of nothing').result).toBe(Result.NO_VDI);
  });

  test('the inode of a snapshot is read', () => {
    const inode = decodeInode(find('inode of the snapshot').payload);
    expect(inode).toMatchObject({
      vid,
      name: recorded.name,
      tag: 'monday',
      isSnapshot: true,
      snapId: 1,
      size: recorded.size,
      blockSizeShift: 22,
      parentVid: 0,
      copies: 2,
      storePolicy: 0,
    });
    expect(inode.snapshotAt).toBeGreaterThanOrEqual(inode.createdAt);
    expect(inode.snapshotAt - inode.createdAt).toBeLessThan(60_000);
  });

  test('the inode of the working VDI that continues from a snapshot is read', () => {
    expect(decodeInode(find('inode of the working VDI').payload)).toMatchObject({
      vid: next,
      name: recorded.name,
      tag: '',
      isSnapshot: false,
      snapId: 2,
      parentVid: vid,
      snapshotAt: 0,
    });
  });

  test('a snapshot adds one to the counts, and the table that continues has the next generation', () => {
    const pair = (label: string): number[] => [find(label).payload.readInt32LE(0), find(label).payload.readInt32LE(4)];
    expect(pair('counts of the snapshot')).toEqual([0, 1]);
    expect(pair('counts of the working VDI')).toEqual([1, 0]);
  });

  test('results: a snapshot is read-only, a missing object is missing', () => {
    expect(find('write to the snapshot').result).toBe(Result.READONLY);
    expect(find('read of nothing').result).toBe(Result.NO_OBJ);
    expect(find('read').result).toBe(Result.SUCCESS);
  });

  test('the list of nodes is read', () => {
    const { payload, response } = find('node list');
    const nodes = decodeNodes(payload, nodeResponse.decode(response).nrNodes);
    expect(nodes.map(({ host, port }) => `${host}:${port}`)).toEqual([7000, 7001, 7002].map((p) => `127.0.0.1:${p}`));
    expect(nodes.map(({ zone, vnodes }) => [zone, vnodes])).toEqual([0, 1, 2].map((zone) => [zone, 128]));
  });

  test('the state of the cluster is read', () => {
    expect(decodeClusterInfo(find('cluster info').payload)).toMatchObject({
      copies: 2,
      status: 1,
      blockSizeShift: 22,
      store: 'plain',
      nodeCount: 3,
    });
  });
});

describe('requests', () => {
  test('headers have the length of the protocol', () => {
    for (const layout of [objectRequest, vdiRequest]) expect(layout.span).toBe(HEADER_BYTES);
    expect(inodeLayout.span).toBe(INODE_HEADER_BYTES);
    expect(inodeLayout.offsetOf('tag')).toBe(INODE_TAG_OFFSET);
    expect(inodeLayout.offsetOf('snapNsec')).toBe(INODE_SNAP_CTIME_OFFSET);
    expect(inodeLayout.offsetOf('vdiSize')).toBe(INODE_VDI_SIZE_OFFSET);
  });

  test('the data path encodes the same bytes as the layout', () => {
    const header = encodeObjectRequest(Opcode.CREATE_AND_WRITE_OBJ, 3, 0x123456, 7, 4096, 512, 0x654321, 8);
    expect(objectRequest.decode(header)).toMatchObject({
      protoVer: 2,
      opcode: Opcode.CREATE_AND_WRITE_OBJ,
      flags: 3,
      epoch: 0,
      dataLength: 512,
      oidHigh: 0x123456,
      oidLow: 7,
      cowHigh: 0x654321,
      cowLow: 8,
      offset: 4096,
      copies: 0,
      tgtEpoch: 0,
    });
  });

  test('our requests have the bytes that real nodes accepted', () => {
    const id = (bytes: Buffer): Buffer => {
      bytes.writeUInt32LE(0, 8);
      return bytes;
    };
    const vid = vdiResponse.decode(find('new VDI').response).vid;
    expect(encodeObjectRequest(Opcode.CREATE_AND_WRITE_OBJ, 1, vid, 0, 1024, 512)).toEqual(id(find('create').request));
    const fields = { vdiSize: recorded.size, baseVid: vid, snapId: 1, blockSizeShift: 22 };
    expect(encodeVdiRequest(Opcode.NEW_VDI, 1, 256, fields)).toEqual(id(find('snapshot').request));
  });

  test('a time written to an inode is read back', () => {
    const header = Buffer.alloc(INODE_HEADER_BYTES);
    encodeTime(1_795_559_587_760).copy(header, INODE_SNAP_CTIME_OFFSET);
    expect(decodeInode(header).snapshotAt).toBe(1_795_559_587_760);
  });
});

describe('--cluster', () => {
  test('accepts hosts, ports and IPv6 addresses', () => {
    expect(parseClusterAddress('a,b:7001,[::1]:7002')).toEqual([
      { host: 'a', port: 7000 },
      { host: 'b', port: 7001 },
      { host: '::1', port: 7002 },
    ]);
    expect(clusterLocation('a,[::1]:7002')).toBe('sheepdog://a:7000,[::1]:7002');
    expect(parseClusterAddress(clusterLocation('a, b'))).toHaveLength(2);
  });

  test.each(['', 'a,', 'a b', 'a:0', 'a:70000', 'a@b', 'http://a'])('refuses %j', (text) => {
    expect(() => parseClusterAddress(text)).toThrow(/give HOST/);
  });
});
