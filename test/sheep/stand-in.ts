/**
 * A Sheepdog cluster in memory, for tests: several listening nodes over one set of objects, speaking the wire protocol.
 * Like real nodes, it answers out of order, leaves zeros out of reads, counts references in ledgers, gives references up
 * after the answer, refuses writes to the data of a vid that became a snapshot, and accepts writes past the end.
 * It also checks its clients: requests that real nodes accept and that lose data are recorded in `violations`.
 */
import net from 'node:net';
import {
  bitmapOf,
  entriesOf,
  GREF,
  INODE_BYTES,
  isZero,
  newInode,
  Requests,
  sectorsWithData,
  TABLE,
} from './stand-in-bytes.js';
import { StandInCopies } from './stand-in-copies.js';
import { StandInDropped } from './stand-in-dropped.js';
import { StandInState } from './stand-in-state.js';

const HEADER = 48;
const VDI_BIT = 1n << 63n;
const BTREE_BIT = 1n << 60n;
/** SD_INODE_DATA_INDEX_SIZE. */
const BTREE_NODE_BYTES = 2 ** 22;
const OBJECTS = 2 ** 20;
const NODE_LIST_ENTRY = 80;
const NODE_VNODES = 128;
/** Length of an entry with the disks of a node, 16 bytes for each of up to 32 (struct disk_info). */
const LONG_NODE_LIST_ENTRY = NODE_LIST_ENTRY + 32 * 16;
/** SD_EC_DATA_STRIPE_SIZE. */
const STRIPE = 512;
const CLUSTER_INFO_BYTES = 48 + 6144 * NODE_LIST_ENTRY;

export const Op = {
  CREATE: 0x01,
  READ: 0x02,
  WRITE: 0x03,
  REMOVE: 0x04,
  NEW_VDI: 0x11,
  LOCK_VDI: 0x12,
  RELEASE_VDI: 0x13,
  GET_VDI_INFO: 0x14,
  READ_VDIS: 0x15,
  DEL_VDI: 0x17,
  GET_NODE_LIST: 0x82,
  GET_VDI_COPIES: 0xab,
  STAT_SHEEP: 0x86,
  STAT_CLUSTER: 0x87,
  STAT_RECOVERY: 0x97,
  EXIST: 0xbd,
  CLUSTER_INFO: 0xbe,
  READ_DEL_VDIS: 0xc9,
} as const;

export const Res = {
  SUCCESS: 0,
  NO_OBJ: 2,
  EIO: 3,
  SYSTEM_ERROR: 6,
  VDI_EXIST: 4,
  INVALID_PARMS: 5,
  VDI_LOCKED: 7,
  NO_VDI: 8,
  NO_TAG: 14,
  VER_MISMATCH: 20,
  NO_SPACE: 21,
  WAIT_FOR_FORMAT: 22,
  WAIT_FOR_JOIN: 23,
  HALT: 25,
  READONLY: 26,
  BUFFER_SMALL: 0x88,
} as const;

/** The requests of our client that 0.8 knows. It answers SYSTEM_ERROR to others. */
const OPS_OF_0_8: ReadonlySet<number> = new Set([
  0x01, 0x02, 0x03, 0x04, 0x11, 0x12, 0x13, 0x14, 0x15, 0x17, 0x82, 0x87,
]);
/** Requests that a node answers from its own disk and memory. */
const OPS_OF_ONE_NODE: ReadonlySet<number> = new Set([
  Op.READ,
  Op.READ_VDIS,
  Op.READ_DEL_VDIS,
  Op.GET_NODE_LIST,
  Op.GET_VDI_COPIES,
  Op.STAT_RECOVERY,
  Op.EXIST,
  Op.CLUSTER_INFO,
]);
/** Requests that are answered before the cluster is formatted (sheep/ops.c, force). */
const FORCED_OPS: ReadonlySet<number> = new Set([Op.READ_VDIS, Op.READ_DEL_VDIS, Op.GET_NODE_LIST, Op.CLUSTER_INFO]);

export interface Seen {
  readonly opcode: number;
  readonly flags: number;
  readonly oid: bigint;
  readonly cowOid: bigint;
  readonly offset: number;
  readonly length: number;
  readonly node: number;
}

/** How a request is made to fail. */
export interface Fault {
  /** Answer with this result and do nothing. */
  readonly result?: number;
  /** Answer with bytes that are no answer. */
  readonly garbage?: boolean;
  /** End the connection before the request is carried out, or after that and before the answer. */
  readonly cut?: 'before' | 'after';
  readonly delayMs?: number;
  /** Carry out the request when this resolves, even if the connection has ended. */
  readonly until?: Promise<void>;
  /** Delay between carrying out and answering. */
  readonly answerDelayMs?: number;
}

export interface StandInOptions {
  readonly nodes?: number;
  readonly useLock?: boolean;
  /** Answers are delayed by a random time up to this. */
  readonly jitterMs?: number;
  /** References are given up this long after the answer, milliseconds. */
  readonly reclaimMs?: number;
  /** Default copy_policy of VDIs, for erasure codes: (data strips / 2) << 4 | parity strips. */
  readonly copyPolicy?: number;
  /** Formatted with -R: vids of deleted families are used again, from the lowest on. */
  readonly recyclesVids?: boolean;
  /** Settings that the cluster was formatted with (-z, -c). */
  readonly blockSizeShift?: number;
  readonly copies?: number;
  /** The address it listens on: 127.0.0.1 or ::1. */
  readonly host?: string;
  /** Nodes and `dog` are built with --enable-diskvnodes: entries of the list of nodes are longer. */
  readonly diskVnodes?: boolean;
  /** The cluster is not formatted yet. */
  readonly isUnformatted?: boolean;
}

export interface Answer {
  readonly result: number;
  /** Or the pieces of it. */
  readonly data?: Buffer | readonly Buffer[];
  readonly fill?: (header: Buffer) => void;
}

const NO_VIDS: ReadonlySet<number> = new Set();

export class StandIn {
  readonly objects = new Map<bigint, Buffer>();
  readonly ledgers = new Map<bigint, Map<number, number>>();
  readonly readOnly = new Set<number>();
  /** Nodes that do not know yet that a vid became a snapshot; they learn of it at the next lookup sent to them. */
  readonly late = new Map<number, Set<number>>();
  /** Number of connections that clients have reset. */
  resets = 0;
  /** Epoch of the members; it increases when they change, and is in every answer. */
  get epoch(): number {
    return this.copies.epoch;
  }

  set epoch(epoch: number) {
    this.copies.epoch = epoch;
  }

  /** Entries change without giving up their references, as nodes do if members change at that moment. */
  forgetsReferences = false;
  readonly violations: string[] = [];
  /** The state that the nodes report. */
  readonly state = new StandInState();
  readonly seen: Seen[] = [];
  /** Nodes that the others no longer count as members: the others refuse their requests. */
  readonly left = new Set<number>();
  /** Nodes that have just started: they know no vids until they have fetched them from the others (sheep/group.c, do_get_vdis). */
  readonly starting = new Set<number>();
  /** Nodes that wait to join their cluster, and carry out no request (sheep/request.c, SD_STATUS_WAIT). */
  readonly notJoined = new Set<number>();
  /** Nodes that recover their objects since the last change. */
  readonly recovering = new Set<number>();
  /** Oids of objects that only the first node has so far. */
  readonly outOfPlace = new Set<bigint>();
  /** Called for every request. */
  fault: (request: Seen) => Fault | undefined = () => undefined;
  /** Copies of single nodes that differ from the others. */
  readonly copies = new StandInCopies(this);
  /** Nodes that do not know yet that the others have dropped them. */
  readonly dropped = new StandInDropped(this);
  readonly #options: Required<StandInOptions>;
  readonly #used = new Set<number>();
  readonly #deleted = new Set<number>();
  readonly #shifts = new Map<number, number>();
  readonly #servers: net.Server[] = [];
  readonly #sockets: Set<net.Socket>[] = [];
  readonly #writing = new Set<{ oid: bigint; from: number; to: number }>();
  #reclaiming = 0;
  /** Objects that are only partly left. */
  readonly #strips = new Set<bigint>();
  #catalogBusy: Promise<void> | undefined;
  ports: number[] = [];
  /** The version of its nodes: their protocol and the requests they know. Our client does not know 0.7. */
  version: '0.7' | '0.8' | '0.9' | '1.0' = '1.0';

  constructor(options: StandInOptions = {}) {
    this.#options = {
      nodes: 3,
      useLock: false,
      jitterMs: 2,
      reclaimMs: 5,
      copyPolicy: 0,
      recyclesVids: false,
      blockSizeShift: 22,
      copies: 2,
      host: '127.0.0.1',
      diskVnodes: false,
      isUnformatted: false,
      ...options,
    };
  }

  get address(): string {
    return this.ports.map((_, n) => this.addressOf(n)).join(',');
  }

  addressOf(n: number): string {
    const { host } = this.#options;
    return `${host.includes(':') ? `[${host}]` : host}:${this.ports[n]}`;
  }

  async start(): Promise<this> {
    for (let n = 0; n < this.#options.nodes; n++) await this.startNode(n, 0);
    return this;
  }

  async startNode(n: number, port: number): Promise<void> {
    const sockets = new Set<net.Socket>();
    const server = net.createServer({ noDelay: true }, (socket) => {
      sockets.add(socket);
      socket.on('error', (error: NodeJS.ErrnoException) => {
        if (error.code === 'ECONNRESET') this.resets++;
      });
      socket.on('close', () => sockets.delete(socket));
      this.#serve(socket, n);
    });
    await new Promise<void>((resolve) => server.listen(port, this.#options.host, resolve));
    this.#servers[n] = server;
    this.#sockets[n] = sockets;
    this.ports[n] = (server.address() as net.AddressInfo).port;
  }

  /** Ends the node as if it were killed. */
  async stopNode(n: number): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#servers[n]?.close(() => resolve()));
    for (const socket of this.#sockets[n] ?? []) socket.destroy();
    await closed;
  }

  async stop(): Promise<void> {
    for (const [n, server] of this.#servers.entries()) if (server.listening) await this.stopNode(n);
  }

  /** Resolves when all references that were given up are accounted for. */
  async settled(): Promise<void> {
    while (this.#reclaiming > 0) await new Promise((resolve) => setTimeout(resolve, 2));
  }

  /** Loses the object as disks that die together do. */
  loseInode(vid: number): void {
    if (!this.objects.delete(VDI_BIT | (BigInt(vid) << 32n))) throw new Error('there is no such inode');
  }

  /** Data objects, each as "vid/idx", the vid in hex and the idx in decimal. */
  dataObjects(): string[] {
    return [...this.objects.keys()]
      .filter((oid) => !(oid & VDI_BIT))
      .map((oid) => `${(oid >> 32n).toString(16)}/${oid & 0xffffffffn}`)
      .sort();
  }

  /** Does what `dog vdi snapshot` does. Names and tags may be any bytes. */
  externalSnapshot(name: string | Buffer, tag: string | Buffer): number {
    const found = this.#lookup(bytesText(name), 0);
    if (typeof found !== 'number') throw new Error(`no ${name.toString()}`);
    this.retag(found, tag);
    return this.#snapshot(bytesText(name), found, found, this.#inode(found));
  }

  /** Does what `dog vdi create` does. */
  externalCreate(name: string | Buffer, size: number, shift = 22): number {
    const vid = this.#freeVid(bytesText(name));
    const inode = newInode();
    inode.write(bytesText(name), 'latin1');
    inode.writeBigUInt64LE(BigInt(size), 536);
    inode.set([this.#options.copyPolicy, 0, this.#options.copyPolicy === 0 ? this.#options.copies : 3, shift], 552);
    this.#finish(inode, vid, 1, 0);
    return vid;
  }

  /** Replaces the tag in an inode, as clients without rules for tags do. */
  retag(vid: number, tag: string | Buffer): void {
    const inode = this.#inode(vid);
    inode.fill(0, 256, 512);
    inode.write(bytesText(tag), 256, 'latin1');
  }

  /** Reads the name in an inode. */
  nameOf(vid: number): string {
    return this.#used.has(vid) ? text(this.#inode(vid), 0) : '';
  }

  /** Does what `dog vdi resize` does, and shrinks too, as our command line on another host can. */
  externalResize(name: string, size: number): void {
    this.#working(name).writeBigUInt64LE(BigInt(size), 536);
  }

  /** Does what `dog vdi alter-copy` does. */
  externalCopies(name: string, copies: number): void {
    this.#working(name)[554] = copies;
  }

  /**
   * Does what `dog vdi delete` does, with the pause between its steps. A VDI that has new entries in its table by then is
   * marked as deleted all the same, and keeps its name (sheep/vdi.c, delete_vdi_work).
   */
  async externalDelete(name: string, meanwhile: () => Promise<void> = () => Promise.resolve()): Promise<void> {
    const inode = this.#working(name);
    const vid = inode.readUInt32LE(560);
    for (const idx of entriesOf(inode)) this.#changeTable(inode, vid, idx, Buffer.alloc(4));
    await meanwhile();
    this.#delete(vid, inode);
  }

  /** Frees the vid of a deleted VDI, as nodes of a cluster formatted with -R do. */
  reuse(vid: number): void {
    this.#used.delete(vid);
    this.#deleted.delete(vid);
    this.objects.delete(VDI_BIT | (BigInt(vid) << 32n));
  }

  /** Sets header fields of the working VDI's inode. */
  header(name: string): { readonly size: number; readonly copies: number; readonly shift: number } {
    const inode = this.#working(name);
    return { size: Number(inode.readBigUInt64LE(536)), copies: inode[554] as number, shift: inode[555] as number };
  }

  /** The locked vids. */
  locks(): number[] {
    return [...this.state.locked.keys()];
  }

  #working(name: string): Buffer {
    const vid = this.#lookup(bytesText(name), 0);
    if (typeof vid !== 'number') throw new Error(`no ${name}`);
    return this.#inode(vid);
  }

  /** The same with the pause of real nodes: their write of the whole inode loses writes to it during the pause. */
  async externalSnapshotSlowly(name: string, tag: string, meanwhile: () => Promise<void>): Promise<number> {
    const vid = this.#lookup(bytesText(name), 0);
    if (typeof vid !== 'number') throw new Error(`no ${name}`);
    this.readOnly.add(vid);
    const read = Buffer.from(this.#inode(vid));
    // Operations on the catalog run one after the other, on all nodes.
    let end: () => void = () => undefined;
    this.#catalogBusy = new Promise((resolve) => (end = resolve));
    await meanwhile();
    read.copy(this.#inode(vid));
    const next = this.externalSnapshot(name, tag);
    this.#catalogBusy = undefined;
    end();
    return next;
  }

  #serve(socket: net.Socket, node: number): void {
    let requests = 0;
    const arriving = new Requests((header, data) => {
      // Without reading the request: whether the node exists, and whether it serves.
      const isGreeting = header[1] === (requests === 0 ? Op.GET_NODE_LIST : requests === 1 ? Op.STAT_RECOVERY : 0);
      requests++;
      void this.#request(socket, node, header, data, isGreeting);
    });
    socket.on('data', (chunk) => arriving.add(chunk));
  }

  /** `isGreeting`: the first requests of a connection, about the node itself. They are not in `seen`. */
  async #request(socket: net.Socket, node: number, header: Buffer, data: Buffer, isGreeting: boolean): Promise<void> {
    const request: Seen = {
      opcode: header[1] as number,
      flags: header.readUInt16LE(2),
      oid: header.readBigUInt64LE(16),
      cowOid: header.readBigUInt64LE(24),
      offset: header.readUInt32LE(40),
      length: header.readUInt32LE(12),
      node,
    };
    if (!isGreeting) this.seen.push(request);
    const fault = this.fault(request);
    if (fault?.until) await fault.until;
    if (this.left.has(node)) return void socket.destroy();
    if (!OPS_OF_ONE_NODE.has(request.opcode)) await this.dropped.of(node)?.knows;
    // Nodes read, change and write back whole stripes of an erasure-coded object.
    const stripe = this.#isErasureCoded(request.oid) ? STRIPE : 1;
    const writing = request.opcode === Op.WRITE && {
      oid: request.oid,
      from: Math.floor(request.offset / stripe) * stripe,
      to: Math.ceil((request.offset + request.length) / stripe) * stripe,
    };
    if (writing && request.length > 0) {
      for (const other of this.#writing) {
        if (other.oid === writing.oid && other.from < writing.to && writing.from < other.to) {
          this.violations.push(`two writes to one range or stripe of ${writing.oid.toString(16)} are in flight`);
        }
      }
      this.#writing.add(writing);
    }
    if (fault?.delayMs) await new Promise((resolve) => setTimeout(resolve, fault.delayMs));
    const jitter = Math.random() * this.#options.jitterMs;
    if (jitter > 0.5) await new Promise((resolve) => setTimeout(resolve, jitter));
    if (writing) this.#writing.delete(writing);
    if (fault?.cut === 'before') return void socket.destroy();
    if (request.opcode >= Op.NEW_VDI && request.opcode <= Op.DEL_VDI && request.opcode !== Op.READ_VDIS) {
      await this.#catalogBusy;
      // A node fetches the others' vids in the queue that also looks up names (sheep/group.c, block_wqueue).
      while (this.starting.has(node)) await new Promise((resolve) => setTimeout(resolve, 2));
      this.late.delete(node);
    }
    const version = request.opcode < 0x80 ? 2 : { '0.7': 8, '0.8': 9, '0.9': 9, '1.0': 0x0a }[this.version];
    let answer: Answer;
    if (fault?.result !== undefined) answer = { result: fault.result };
    else if (header[0] !== version) answer = { result: Res.VER_MISMATCH };
    else if (this.version === '0.8' && !OPS_OF_0_8.has(request.opcode)) answer = { result: Res.SYSTEM_ERROR };
    else if (this.#options.isUnformatted && !FORCED_OPS.has(request.opcode)) answer = { result: Res.WAIT_FOR_FORMAT };
    else if (this.notJoined.has(node) && !FORCED_OPS.has(request.opcode)) answer = { result: Res.WAIT_FOR_JOIN };
    else answer = this.#execute(request, header, data);
    if (fault?.answerDelayMs) await new Promise((resolve) => setTimeout(resolve, fault.answerDelayMs));
    if (fault?.cut === 'after') return void socket.destroy();
    if (fault?.garbage) return void socket.write(Buffer.alloc(HEADER, 0xa5));
    const response = Buffer.alloc(HEADER);
    header.copy(response, 0, 0, 12);
    response.writeUInt32LE(this.dropped.of(node)?.epoch ?? this.epoch, 4);
    const pieces = answer.data === undefined ? [] : Buffer.isBuffer(answer.data) ? [answer.data] : answer.data;
    response.writeUInt32LE(
      pieces.reduce((sum, { length }) => sum + length, 0),
      12,
    );
    response.writeUInt32LE(answer.result, 16);
    answer.fill?.(response);
    if (socket.destroyed) return;
    socket.cork();
    socket.write(response);
    for (const piece of pieces) if (piece.length > 0) socket.write(piece);
    socket.uncork();
  }

  #execute(request: Seen, header: Buffer, data: Buffer): Answer {
    const ofPeer = this.copies.answer(request, header);
    if (ofPeer) return ofPeer;
    switch (request.opcode) {
      case Op.READ:
        return this.#read(request);
      case Op.WRITE:
        return this.#write(request, data);
      case Op.CREATE:
        return this.#create(request, data);
      case Op.REMOVE:
        return { result: this.objects.delete(request.oid) ? Res.SUCCESS : Res.NO_OBJ };
      case Op.EXIST: {
        // sheep/ops.c, local_oid_exist: it reads a list of nodes that does not exist yet, and crashes.
        if (this.state.notServing !== undefined)
          this.violations.push('EXIST to a node that has not joined, which ends it');
        const isHere =
          this.#objectsOf(request.node).has(request.oid) && (request.node === 0 || !this.outOfPlace.has(request.oid));
        return { result: isHere ? Res.SUCCESS : Res.NO_OBJ };
      }
      case Op.READ_VDIS:
        return { result: Res.SUCCESS, data: bitmapOf(this.#vidsOf(request.node)[0]) };
      case Op.READ_DEL_VDIS:
        return { result: Res.SUCCESS, data: bitmapOf(this.#vidsOf(request.node)[1]) };
      case Op.CLUSTER_INFO: {
        if (request.length < CLUSTER_INFO_BYTES) this.violations.push('CLUSTER_INFO with too little room');
        return { result: Res.SUCCESS, data: this.#clusterInfo(request.node) };
      }
      case Op.GET_NODE_LIST: {
        const isMember = (n: number): boolean => !this.left.has(n) && !this.dropped.of(n);
        const ports = this.ports.filter((_, n) => isMember(n) || this.dropped.of(request.node));
        const entry = this.#options.diskVnodes ? LONG_NODE_LIST_ENTRY : NODE_LIST_ENTRY;
        const list = Buffer.alloc(ports.length * entry);
        for (const [n, port] of ports.entries()) {
          list.set(this.#options.host === '::1' ? [0, 0, 0, 1] : [127, 0, 0, 1], n * entry + 24 + 12);
          list.writeUInt16LE(port, n * entry + 40);
          list.writeUInt16LE(NODE_VNODES, n * entry + 64);
          list.writeUInt32LE(n, n * entry + 68);
          if (this.#options.diskVnodes) {
            list.writeBigUInt64LE(BigInt(port), n * entry + NODE_LIST_ENTRY);
            list.writeBigUInt64LE(20n * 2n ** 30n, n * entry + NODE_LIST_ENTRY + 8);
          }
        }
        return { result: Res.SUCCESS, data: list, fill: (h) => h.writeUInt32LE(ports.length, 20) };
      }
      default:
        if (this.version === '0.8' && request.opcode === Op.STAT_CLUSTER) {
          return { result: Res.SUCCESS, data: this.#epochLog() };
        }
        if (request.opcode === Op.STAT_RECOVERY && this.recovering.has(request.node)) {
          return { result: Res.SUCCESS, data: Buffer.alloc(24, 1) };
        }
        return (
          this.state.answer(request.opcode, request.node, header, this.ports, this.#used) ??
          this.#catalog(request, header, data)
        );
    }
  }

  #clusterInfo(node: number): Buffer {
    const { nodes, useLock, diskVnodes, recyclesVids, isUnformatted, copies, copyPolicy, blockSizeShift } =
      this.#options;
    const info = Buffer.alloc(CLUSTER_INFO_BYTES);
    info.writeInt16LE(isUnformatted ? 0 : nodes, 2);
    if (isUnformatted) {
      info[20] = 2;
      return info;
    }
    info.writeUInt32LE(this.dropped.of(node)?.epoch ?? this.epoch, 4);
    info.writeUInt32LE(1_700_000_000, 12);
    info.writeUInt16LE((diskVnodes ? 2 : 0) | (useLock ? 8 : 0) | (recyclesVids ? 16 : 0), 16);
    info.set([copies, copyPolicy, 1, this.version === '1.0' ? blockSizeShift : 0], 18);
    info.write('plain', this.version === '1.0' ? 25 : 28);
    this.state.describe(info);
    return info;
  }

  /** One struct epoch_log of 0.8. */
  #epochLog(): Buffer {
    const log = Buffer.alloc(48 + 6144 * NODE_LIST_ENTRY);
    log.writeUInt32LE(1_700_000_000, 4);
    log.writeUInt32LE(1, 16);
    log.writeUInt32LE(this.#options.nodes, 20);
    log.set([0, 2, 0], 24);
    log.write('plain', 28);
    return log;
  }

  /** The bitmaps of vids in use and of deleted vids. */
  vidsNow(): [Set<number>, Set<number>] {
    return [new Set(this.#used), new Set(this.#deleted)];
  }

  #vidsOf(node: number): readonly [ReadonlySet<number>, ReadonlySet<number>] {
    if (this.starting.has(node)) return [NO_VIDS, NO_VIDS];
    return this.dropped.of(node)?.vids ?? [this.#used, this.#deleted];
  }

  #objectsOf(node: number): ReadonlyMap<bigint, Buffer> {
    return this.dropped.of(node)?.objects ?? this.objects;
  }

  #read({ oid, offset, length, node }: Seen): Answer {
    const object = this.#objectsOf(node).get(oid);
    if (!object || this.#strips.has(oid)) return { result: Res.NO_OBJ };
    const [from, to] = sectorsWithData(object.subarray(offset, offset + length), length);
    const data = Buffer.alloc(to - from);
    object.copy(data, 0, Math.min(offset + from, object.length), offset + to);
    return { result: Res.SUCCESS, data, fill: (h) => h.writeBigUInt64LE(BigInt(from), 24) };
  }

  #write({ oid, offset, length, node }: Seen, data: Buffer): Answer {
    if (this.#isReadOnly(oid, node)) return { result: Res.READONLY };
    const object = this.objects.get(oid);
    if (!object) return { result: Res.NO_OBJ };
    this.#checkBounds(oid, offset, length);
    const isTable = (oid & VDI_BIT) !== 0n && offset >= TABLE && offset + length <= TABLE + 4 * OBJECTS && length > 0;
    if (isTable && object[553] !== 0) this.violations.push(`the index of ${oid.toString(16)} is taken for a table`);
    if (isTable) this.#changeTable(object, vidOf(oid), (offset - TABLE) / 4, data);
    else {
      // sheep/gateway.c, init_erasure_buffer: the first stripe of a write is read only if the write begins inside it.
      const end = offset + length;
      if (this.#isErasureCoded(oid) && offset % STRIPE === 0 && length > 0 && length < STRIPE) {
        object.fill(0, end, Math.min(offset + STRIPE, object.length));
      }
      data.copy(object, offset);
    }
    return { result: Res.SUCCESS };
  }

  #changeTable(inode: Buffer, vid: number, first: number, data: Buffer): void {
    for (let n = 0; n * 4 < data.length; n++) {
      const idx = first + n;
      const before = inode.readUInt32LE(TABLE + idx * 4);
      const after = data.readUInt32LE(n * 4);
      const generation = inode.readInt32LE(GREF + idx * 8);
      const count = inode.readInt32LE(GREF + idx * 8 + 4);
      if (before === after && after !== 0) this.violations.push(`entry ${idx} of ${vid.toString(16)} is rewritten`);
      if (after !== 0 && !this.objects.has(dataOid(after, idx))) {
        this.violations.push(`entry ${idx} of ${vid.toString(16)} is set before its object is there`);
      }
      inode.writeUInt32LE(after, TABLE + idx * 4);
      inode.fill(0, GREF + idx * 8, GREF + idx * 8 + 8);
      if (before === 0 || before === after || this.forgetsReferences) continue;
      this.#reclaiming++;
      setTimeout(() => {
        this.#giveUp(dataOid(before, idx), generation, count);
        this.#reclaiming--;
      }, this.#options.reclaimMs);
    }
  }

  #giveUp(oid: bigint, generation: number, count: number): void {
    const ledger = this.ledgers.get(oid) ?? new Map([[0, 1]]);
    const add = (at: number, n: number): void => {
      const sum = (ledger.get(at) ?? 0) + n;
      if (sum === 0) ledger.delete(at);
      else ledger.set(at, sum);
    };
    add(generation, -1);
    add(generation + 1, count);
    if (ledger.size > 0) {
      this.ledgers.set(oid, ledger);
      return;
    }
    this.ledgers.delete(oid);
    if (!this.#isErasureCoded(oid)) return void this.objects.delete(oid);
    // Its strips are removed one after the other; the last one even if it belongs to a new object by then.
    this.#strips.add(oid);
    this.#reclaiming++;
    setTimeout(() => {
      this.#strips.delete(oid);
      this.objects.delete(oid);
      this.#reclaiming--;
    }, this.#options.reclaimMs);
  }

  #create({ oid, cowOid, flags, offset, length, node }: Seen, data: Buffer): Answer {
    if (this.#isReadOnly(oid, node)) return { result: Res.READONLY };
    const size = this.#objectSize(oid);
    // A whole object is kept where it was received.
    const isWhole = offset === 0 && length >= size;
    const object = isWhole ? data : Buffer.alloc(Math.max(size, offset + length));
    if (flags & 2) {
      if (length === size) this.violations.push('a write of a whole object asks for a copy of it first');
      const source = this.objects.get(cowOid);
      if (!source) return { result: Res.NO_OBJ };
      if (!isWhole) source.copy(object);
    }
    this.#checkBounds(oid, offset, length);
    if (!isWhole) data.copy(object, offset);
    this.objects.set(oid, object);
    return { result: Res.SUCCESS };
  }

  #checkBounds(oid: bigint, offset: number, length: number): void {
    if (offset + length > this.#objectSize(oid)) this.violations.push(`write past the end of ${oid.toString(16)}`);
  }

  #objectSize(oid: bigint): number {
    if (oid & BTREE_BIT) return BTREE_NODE_BYTES;
    return oid & VDI_BIT ? INODE_BYTES : 2 ** (this.#shifts.get(vidOf(oid)) ?? 22);
  }

  #isErasureCoded(oid: bigint): boolean {
    if (oid & (VDI_BIT | BTREE_BIT)) return false;
    const inode = this.objects.get(VDI_BIT | (BigInt(vidOf(oid)) << 32n));
    return inode !== undefined && inode[552] !== 0;
  }

  #isReadOnly(oid: bigint, node: number): boolean {
    return !(oid & (VDI_BIT | BTREE_BIT)) && this.readOnly.has(vidOf(oid)) && !this.late.get(node)?.has(vidOf(oid));
  }

  #catalog({ opcode, length, node }: Seen, header: Buffer, data: Buffer): Answer {
    const name = text(data, 0);
    const snapId = header.readUInt32LE(32);
    const baseVid = header.readUInt32LE(24);
    const withVid = (vid: number): Answer => ({ result: Res.SUCCESS, fill: (h) => h.writeUInt32LE(vid, 24) });
    switch (opcode) {
      case Op.GET_VDI_INFO: {
        const vid = this.#lookup(name, snapId);
        return typeof vid === 'number' ? withVid(vid) : { result: vid.error };
      }
      case Op.LOCK_VDI: {
        const vid = this.#lookup(name, snapId);
        if (typeof vid !== 'number') return { result: vid.error };
        if (this.#options.useLock && this.state.locked.has(vid)) return { result: Res.VDI_LOCKED };
        this.state.locked.set(vid, node);
        return withVid(vid);
      }
      case Op.RELEASE_VDI:
        this.state.release(baseVid, node, header.readUInt32LE(36) === 1);
        return { result: Res.SUCCESS };
      case Op.NEW_VDI: {
        if (length !== 256) return { result: Res.INVALID_PARMS };
        const working = this.#lookup(name, 0);
        if (snapId !== 0) {
          if (typeof working !== 'number') return { result: working.error };
          const asked = Buffer.alloc(556);
          header.copy(asked, 536, 16, 24);
          asked.set([header[29] as number, 0, header[28] as number, header[31] as number], 552);
          return withVid(this.#snapshot(name, working, baseVid, asked));
        }
        if (typeof working === 'number') return { result: Res.VDI_EXIST };
        if (working.error !== Res.NO_VDI) return { result: working.error };
        const vid = this.#freeVid(name);
        const inode = newInode();
        inode.write(name, 'latin1');
        inode.writeBigUInt64LE(header.readBigUInt64LE(16), 536);
        const { copies, copyPolicy, blockSizeShift } = this.#options;
        const policy = header[28] === 0 ? copyPolicy : (header[29] as number);
        inode.set([policy, 0, policy === 0 ? header[28] || copies : 3, header[31] || blockSizeShift], 552);
        this.#finish(inode, vid, this.#nextSnapId(name), baseVid);
        if (baseVid !== 0) this.#derive(baseVid, inode);
        return withVid(vid);
      }
      case Op.DEL_VDI: {
        const vid = this.#lookup(name, snapId);
        if (typeof vid !== 'number') return { result: vid.error };
        const inode = this.#inode(vid);
        if (inode[553] !== 0) {
          if (this.dataObjects().some((object) => object.split('/')[0]?.endsWith(vid.toString(16)))) {
            this.violations.push(`"${name}" is deleted with objects of its own`);
          }
        } else if (!isZero(inode.subarray(TABLE, GREF))) {
          this.violations.push(`"${name}" is deleted with objects in its table`);
          // sheep/vdi.c, delete_vdi_work and post_cluster_del_vdi: the record stays, and the answer is success.
          this.#deleted.add(vid);
          return withVid(vid);
        }
        this.#delete(vid, inode);
        if (this.#options.recyclesVids) this.#recycle(vid);
        return withVid(vid);
      }
      default:
        return { result: Res.INVALID_PARMS };
    }
  }

  #delete(vid: number, inode: Buffer): void {
    this.#deleted.add(vid);
    const isEmpty = inode[553] !== 0 || isZero(inode.subarray(TABLE, GREF));
    if (!isEmpty) return;
    inode.fill(0, 0, 256);
    inode.fill(0, 536, 544);
  }

  /** Nodes take fields of the new working VDI from the request, not from its base: `like` has the layout of an inode. */
  #snapshot(name: string, working: number, baseVid: number, like: Buffer): number {
    this.readOnly.add(working);
    const now = BigInt(Math.floor(Date.now() / 1000)) << 32n;
    const before = this.#inode(working);
    before.writeBigUInt64LE(now, 520);
    const vid = this.#freeVid(name);
    const inode = newInode();
    inode.write(name, 'latin1');
    like.copy(inode, 536, 536, 544);
    like.copy(inode, 552, 552, 556);
    this.#finish(inode, vid, before.readUInt32LE(556) + 1, baseVid);
    this.#derive(baseVid, inode);
    return vid;
  }

  #finish(inode: Buffer, vid: number, snapId: number, parent: number): void {
    inode.writeBigUInt64LE(
      (BigInt(Math.floor(Date.now() / 1000)) << 32n) | BigInt((Date.now() % 1000) * 1_000_000),
      512,
    );
    inode.writeUInt32LE(snapId, 556);
    inode.writeUInt32LE(vid, 560);
    inode.writeUInt32LE(parent, 564);
    this.#used.add(vid);
    this.#shifts.set(vid, inode[555] as number);
    this.objects.set(VDI_BIT | (BigInt(vid) << 32n), inode);
  }

  /** Copies the table of the base, adds one to its counts, and takes the next generation. */
  #derive(baseVid: number, inode: Buffer): void {
    this.readOnly.add(baseVid);
    const base = this.#inode(baseVid);
    for (const idx of entriesOf(base)) {
      inode.writeUInt32LE(base.readUInt32LE(TABLE + idx * 4), TABLE + idx * 4);
      inode.writeInt32LE(base.readInt32LE(GREF + idx * 8) + 1, GREF + idx * 8);
      base.writeInt32LE(base.readInt32LE(GREF + idx * 8 + 4) + 1, GREF + idx * 8 + 4);
    }
  }

  #inode(vid: number): Buffer {
    const inode = this.objects.get(VDI_BIT | (BigInt(vid) << 32n));
    if (!inode) throw new Error(`no inode of ${vid.toString(16)}`);
    return inode;
  }

  /** sheep/vdi.c, vdi_lookup and fill_vdi_info_range: from the last vid back, in the chain or, with -R, in all vids. */
  #lookup(name: string, snapId: number): number | { error: number } {
    const { recyclesVids } = this.#options;
    let found = false;
    for (const vid of recyclesVids ? [...this.#used].sort((a, b) => b - a) : this.#chain(name)) {
      const inode = this.objects.get(VDI_BIT | (BigInt(vid) << 32n));
      // The nodes give up at any lost inode, also of another name.
      if (!inode) return { error: Res.NO_OBJ };
      if (text(inode, 0) !== name) continue;
      const isSnapshot = inode.readBigUInt64LE(520) !== 0n;
      // With -R the nodes take a snapshot for the working VDI if it has the highest vid.
      if (snapId === 0) return isSnapshot && !recyclesVids ? { error: Res.NO_VDI } : vid;
      if (!isSnapshot) found = true;
      else if (inode.readUInt32LE(556) === snapId) return vid;
    }
    return { error: found ? Res.NO_TAG : Res.NO_VDI };
  }

  /** From the last vid back to the hash of the name. */
  #chain(name: string): number[] {
    const first = hash(Buffer.from(name, 'latin1'));
    const vids: number[] = [];
    for (let vid = first; this.#used.has(vid); vid++) vids.unshift(vid);
    return vids;
  }

  #freeVid(name: string): number {
    let vid = this.#options.recyclesVids ? 1 : hash(Buffer.from(name, 'latin1'));
    while (this.#used.has(vid)) vid++;
    return vid;
  }

  /** sheep/vdi.c, run_vid_gc: vids are free when all descendants of one root are deleted. */
  #recycle(deleted: number): void {
    const rootOf = (vid: number): number => {
      const parent = this.#inode(vid).readUInt32LE(564);
      return parent === 0 ? vid : rootOf(parent);
    };
    const root = rootOf(deleted);
    const family = [...this.#used].filter((vid) => rootOf(vid) === root);
    if (!family.every((vid) => this.#deleted.has(vid))) return;
    for (const vid of family) {
      for (const vids of [this.#used, this.#deleted, this.readOnly]) vids.delete(vid);
      this.state.locked.delete(vid);
      this.objects.delete(VDI_BIT | (BigInt(vid) << 32n));
    }
  }

  #nextSnapId(name: string): number {
    let highest = 0;
    for (const vid of this.#used) {
      const inode = this.objects.get(VDI_BIT | (BigInt(vid) << 32n));
      if (inode && text(inode, 0) === name) highest = Math.max(highest, inode.readUInt32LE(556));
    }
    return highest + 1;
  }
}

/** FNV-1a-64, its low 24 bits. */
export function hash(name: string | Buffer): number {
  let value = 0xcbf29ce484222325n;
  for (const byte of Buffer.from(name)) value = ((value ^ BigInt(byte)) * 0x100000001b3n) & 0xffffffffffffffffn;
  return Number(value & 0xffffffn) || 1;
}

function vidOf(oid: bigint): number {
  return Number((oid >> 32n) & 0xffffffn);
}

function dataOid(vid: number, idx: number): bigint {
  return (BigInt(vid) << 32n) | BigInt(idx);
}

/** A name as it is stored, one character per byte. */
function text(buffer: Buffer, offset: number): string {
  const end = buffer.indexOf(0, offset);
  return buffer.toString('latin1', offset, end < 0 ? offset + 256 : end);
}

/** The same for a name given by a test. */
function bytesText(name: string | Buffer): string {
  return Buffer.from(name).toString('latin1');
}
