/**
 * The option phase, client side: greeting, options, and what they agreed on (proto.md, "Fixed newstyle negotiation", "Option
 * types"). It owns the bytes received until an export is open, and the meta contexts that were selected; it neither opens
 * nor closes the socket.
 */

import type { Duplex } from 'node:stream';
import { ALLOCATION_CONTEXT, type ExportInfo } from '../block-device.js';
import { ByteReader } from '../protocol/byte-reader.js';
import {
  decodeString,
  encodeInfoRequest,
  encodeMetaQueries,
  encodeOption,
  EXPORT_NAME_PADDING,
  GREETING_SIZE,
  HANDSHAKE_FLAG,
  INFO,
  MAX_MINIMUM_BLOCK_SIZE,
  NBD_MAGIC_HIGH,
  NBD_MAGIC_LOW,
  OPT,
  OPTION_MAGIC_HIGH,
  OPTION_MAGIC_LOW,
  OPTION_REPLY_HEADER_SIZE,
  OPTION_REPLY_MAGIC_HIGH,
  OPTION_REPLY_MAGIC_LOW,
  readUInt64,
  REP,
  REP_ERROR_BIT,
  TRANSMISSION_FLAG,
} from '../protocol/wire.js';
import { NbdClientError, type NbdClientErrorCode } from './client-error.js';
import { makeDetails, type ExportDetails } from './export-details.js';
import type { ReplyLevel } from './reply-reader.js';

/** The longest option reply accepted, bytes. */
const MAX_OPTION_REPLY_BYTES = 64 * 1024;
/** The most replies to one option, and their bytes together. */
const MAX_OPTION_REPLIES = 64 * 1024;
const MAX_OPTION_REPLIES_BYTES = 16 * 1024 * 1024;
const OPTION_ERROR_CODES: ReadonlyMap<number, NbdClientErrorCode> = new Map<number, NbdClientErrorCode>([
  [REP.ERR_UNSUP, 'UNSUPPORTED'],
  [REP.ERR_POLICY, 'POLICY'],
  [REP.ERR_INVALID, 'INVALID'],
  [REP.ERR_TLS_REQD, 'TLS_REQUIRED'],
  [REP.ERR_UNKNOWN, 'UNKNOWN_EXPORT'],
  [REP.ERR_SHUTDOWN, 'ESHUTDOWN'],
]);

interface OptionReply {
  readonly type: number;
  readonly data: Buffer;
}

/** Ends the connection; everything pending fails with the error that it returns. */
export type EndConnection = (code: 'PROTOCOL' | 'TIMED_OUT', message: string) => NbdClientError;

/** What the methods return is to be awaited before the next is called (`inTurn`). */
export class OptionPhase {
  /** The kind of replies that was negotiated; undefined before the first option that depends on it. */
  level: ReplyLevel | undefined;
  /** The selected contexts and their ids on the wire. */
  readonly contextIds = new Map<string, number>();
  canFilterContexts = false;

  readonly #reader: ByteReader;
  readonly #wantedLevel: ReplyLevel | undefined;
  readonly #timeoutMs: number;
  readonly #end: EndConnection;
  #socket: Duplex;
  #noZeroes = false;
  #contextExport: string | undefined;
  #isOver = false;
  #failure: NbdClientError | undefined;
  /** Settles, and never rejects, when the options before have their answers. */
  #turn: Promise<unknown> = Promise.resolve();

  /** @param timeoutMs how long the server may be silent after an option; 0: for ever */
  constructor(socket: Duplex, wantedLevel: ReplyLevel | undefined, timeoutMs: number, end: EndConnection) {
    this.#socket = socket;
    this.#reader = new ByteReader(socket);
    this.#wantedLevel = wantedLevel;
    this.#timeoutMs = timeoutMs;
    this.#end = end;
  }

  #violated(message: string): NbdClientError {
    return this.#end('PROTOCOL', message);
  }

  /** One option at a time: a server's answers name the option, not the question. */
  inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(work);
    this.#turn = result.catch(() => undefined);
    return result;
  }

  readonly feed = (chunk: Buffer): void => this.#reader.feed(chunk);

  /** Bytes that arrived and were not read yet. */
  get unread(): number {
    return this.#reader.unread;
  }

  /** Further bytes come from the TLS stream. */
  moveTo(socket: Duplex): void {
    this.#socket = socket;
    this.#reader.moveTo(socket);
  }

  /** The connection is unusable: an option that waits for its reply fails with `error`. */
  fail(error: NbdClientError): void {
    if (!this.#isOver) this.#failure = error;
    this.#isOver = true;
    this.#reader.fail(error);
  }

  /** The phase is over. Returns the bytes after the last option reply. */
  end(): Buffer {
    this.#isOver = true;
    return this.#reader.takeRest();
  }

  async greet(): Promise<void> {
    const greeting = await this.#reader.read(GREETING_SIZE);
    if (
      greeting.readUInt32BE(0) !== NBD_MAGIC_HIGH ||
      greeting.readUInt32BE(4) !== NBD_MAGIC_LOW ||
      greeting.readUInt32BE(8) !== OPTION_MAGIC_HIGH ||
      greeting.readUInt32BE(12) !== OPTION_MAGIC_LOW
    ) {
      throw this.#violated('not a newstyle NBD server');
    }
    const offered = greeting.readUInt16BE(16);
    if ((offered & HANDSHAKE_FLAG.FIXED_NEWSTYLE) === 0) throw this.#violated('the server is not fixed newstyle');
    const flags = Buffer.alloc(4);
    flags.writeUInt32BE(offered & (HANDSHAKE_FLAG.FIXED_NEWSTYLE | HANDSHAKE_FLAG.NO_ZEROES), 0);
    this.#noZeroes = (offered & HANDSHAKE_FLAG.NO_ZEROES) !== 0;
    this.#socket.write(flags);
  }

  /** Negotiate the kind of replies, once, as late as possible: an earlier negotiation would not survive TLS. */
  async #negotiateReplies(): Promise<void> {
    if (this.level !== undefined) return;
    const wanted = this.#wantedLevel;
    const accepts = (option: number): Promise<boolean> => unlessRefused(this.ask(option, Buffer.alloc(0)));
    if ((wanted ?? 'extended') === 'extended' && (await accepts(OPT.EXTENDED_HEADERS))) this.level = 'extended';
    else if ((wanted ?? 'structured') === 'structured' && (await accepts(OPT.STRUCTURED_REPLY)))
      this.level = 'structured';
    else if ((wanted ?? 'simple') === 'simple') this.level = 'simple';
    else throw new NbdClientError('UNSUPPORTED', `the server has no ${wanted} replies`);
  }

  #metaContexts(replies: readonly OptionReply[]): { readonly id: number; readonly name: string }[] {
    return replies.map(({ type, data }) => {
      const name = type === REP.META_CONTEXT && data.length > 4 ? decodeString(data.subarray(4)) : undefined;
      if (name === undefined) throw this.#violated('a malformed meta context');
      return { id: data.readUInt32BE(0), name };
    });
  }

  /** The exports the server lists (NBD_OPT_LIST). */
  async list(): Promise<ExportInfo[]> {
    const exports: ExportInfo[] = [];
    for (const { type, data } of await this.ask(OPT.LIST, Buffer.alloc(0))) {
      if (type !== REP.SERVER) continue;
      const nameLength = data.length >= 4 ? data.readUInt32BE(0) : Infinity;
      if (nameLength > data.length - 4) throw this.#violated('a malformed list entry');
      const name = decodeString(data.subarray(4, 4 + nameLength));
      const description = decodeString(data.subarray(4 + nameLength));
      if (name === undefined || description === undefined) throw this.#violated('a list entry that is not a string');
      exports.push({ name, description });
    }
    return exports;
  }

  async info(exportName: string): Promise<ExportDetails> {
    await this.#negotiateReplies();
    return this.#details(await this.ask(OPT.INFO, infoQuery(exportName)));
  }

  async listContexts(exportName: string, queries: readonly string[]): Promise<string[]> {
    await this.#negotiateReplies();
    const replies = await this.ask(OPT.LIST_META_CONTEXT, encodeMetaQueries(exportName, queries));
    return this.#metaContexts(replies).map(({ name }) => name);
  }

  async selectContexts(exportName: string, names: readonly string[]): Promise<void> {
    await this.#negotiateReplies();
    // None before and none now: there is nothing to ask for, and a server that has no contexts would refuse it.
    const isNoChange = names.length === 0 && this.contextIds.size === 0;
    this.contextIds.clear();
    // If the server refuses, nothing is selected for any export.
    this.#contextExport = undefined;
    const replies = isNoChange ? [] : await this.ask(OPT.SET_META_CONTEXT, encodeMetaQueries(exportName, names));
    for (const { id, name } of this.#metaContexts(replies)) {
      if (new Set(this.contextIds.values()).has(id)) throw this.#violated('two meta contexts with the same id');
      // Also contexts that were not queried: block statuses will be answered for them.
      this.contextIds.set(name, id);
    }
    this.#contextExport = exportName;
  }

  /** See NbdClient.go. */
  async open(exportName: string): Promise<ExportDetails> {
    await this.#negotiateReplies();
    if (this.level !== 'simple' && this.#contextExport !== exportName) {
      await unlessRefused(this.selectContexts(exportName, [ALLOCATION_CONTEXT]));
    }
    try {
      return this.#details(await this.ask(OPT.GO, infoQuery(exportName)));
    } catch (error) {
      if (!(error instanceof NbdClientError) || error.code !== 'UNSUPPORTED' || this.level === 'extended') throw error;
      return this.#openByName(exportName);
    }
  }

  /** Send an option. Returns its replies before the acknowledgement. Errors: NbdClientError with the server's error reply. */
  async ask(option: number, data: Buffer): Promise<OptionReply[]> {
    if (this.#isOver) throw this.#failure ?? new NbdClientError('CLOSED', 'options may only be sent before go()');
    this.#socket.write(encodeOption(option, data));
    const clock = this.#startClock(option);
    try {
      return await this.#readReplies(option, clock);
    } finally {
      clearTimeout(clock);
    }
  }

  #startClock(option: number): NodeJS.Timeout | undefined {
    if (this.#timeoutMs === 0) return undefined;
    const end = (): void => {
      this.#end('TIMED_OUT', `the server was silent for ${this.#timeoutMs} ms after the option ${optionName(option)}`);
    };
    return setTimeout(end, this.#timeoutMs);
  }

  async #readReplies(option: number, clock: NodeJS.Timeout | undefined): Promise<OptionReply[]> {
    const replies: OptionReply[] = [];
    let bytes = 0;
    for (;;) {
      const header = await this.#reader.read(OPTION_REPLY_HEADER_SIZE);
      const length = header.readUInt32BE(16);
      if (
        header.readUInt32BE(0) !== OPTION_REPLY_MAGIC_HIGH ||
        header.readUInt32BE(4) !== OPTION_REPLY_MAGIC_LOW ||
        header.readUInt32BE(8) !== option ||
        length > MAX_OPTION_REPLY_BYTES ||
        replies.length >= MAX_OPTION_REPLIES ||
        (bytes += length) > MAX_OPTION_REPLIES_BYTES
      ) {
        throw this.#violated('a malformed option reply');
      }
      const reply = { type: header.readUInt32BE(12), data: await this.#reader.read(length) };
      clock?.refresh();
      if (reply.type === REP.ACK) return replies;
      if (reply.type >= REP_ERROR_BIT) {
        const message = decodeString(reply.data) || `the server refused the option ${optionName(option)}`;
        throw new NbdClientError(OPTION_ERROR_CODES.get(reply.type) ?? 'REFUSED', message);
      }
      replies.push(reply);
    }
  }

  async #openByName(exportName: string): Promise<ExportDetails> {
    this.#socket.write(encodeOption(OPT.EXPORT_NAME, Buffer.from(exportName)));
    const clock = this.#startClock(OPT.EXPORT_NAME);
    try {
      const reply = await this.#reader.read(10 + (this.#noZeroes ? 0 : EXPORT_NAME_PADDING));
      return makeDetails(readUInt64(reply, 0), reply.readUInt16BE(8));
    } finally {
      clearTimeout(clock);
    }
  }

  #details(replies: readonly OptionReply[]): ExportDetails {
    let details: ExportDetails | undefined;
    let transmissionFlags = 0;
    let sizes: Partial<ExportDetails> = {};
    let name: string | undefined;
    let description: string | undefined;
    for (const { type, data } of replies) {
      if (type !== REP.INFO || data.length < 2) continue;
      const info = data.readUInt16BE(0);
      if (info === INFO.EXPORT && data.length === 12) {
        transmissionFlags = data.readUInt16BE(10);
        details = makeDetails(readUInt64(data, 2), transmissionFlags);
      }
      if (info === INFO.NAME) name = decodeString(data.subarray(2));
      if (info === INFO.DESCRIPTION) description = decodeString(data.subarray(2));
      if (info === INFO.BLOCK_SIZE && data.length === 14) {
        sizes = {
          minimumBlockSize: data.readUInt32BE(2),
          preferredBlockSize: data.readUInt32BE(6),
          maximumPayload: data.readUInt32BE(10),
        };
      }
    }
    if (details === undefined) throw this.#violated('the server did not tell the size of the export');
    const problem = sizesProblem({ ...details, ...sizes });
    if (problem !== undefined) throw this.#violated(problem);
    this.canFilterContexts = (transmissionFlags & TRANSMISSION_FLAG.BLOCK_STATUS_PAYLOAD) !== 0;
    return { ...details, ...sizes, name, description };
  }
}

/** Whether an option was accepted; false if the server refused it and the connection continues. */
async function unlessRefused(option: Promise<unknown>): Promise<boolean> {
  try {
    await option;
    return true;
  } catch (error) {
    if (!(error instanceof NbdClientError) || isFatal(error)) throw error;
    return false;
  }
}

/** The connection is over. */
function isFatal({ code }: NbdClientError): boolean {
  return code === 'PROTOCOL' || code === 'CLOSED' || code === 'TIMED_OUT';
}

/** For messages. */
function optionName(option: number): string {
  const found = Object.entries(OPT).find(([, value]) => value === option);
  return found === undefined ? String(option) : `NBD_OPT_${found[0]}`;
}

/** What requests are cut by must be usable (proto.md, "Size constraints"). */
function sizesProblem({ minimumBlockSize, maximumPayload }: ExportDetails): string | undefined {
  const isPower = minimumBlockSize > 0 && (minimumBlockSize & (minimumBlockSize - 1)) === 0;
  if (!isPower || minimumBlockSize > MAX_MINIMUM_BLOCK_SIZE) return `a minimum block size of ${minimumBlockSize} bytes`;
  if (maximumPayload < minimumBlockSize) return `a maximum payload of ${maximumPayload} bytes, less than a block`;
  return undefined;
}

function infoQuery(exportName: string): Buffer {
  return encodeInfoRequest(exportName, [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE]);
}
