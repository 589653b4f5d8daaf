/**
 * The handshake, server side: from the greeting to the moment requests may come. It owns option haggling (proto.md,
 * "Fixed newstyle negotiation", "Option types"); it never touches the socket itself and leaves nothing open when it
 * fails: devices are opened through its connection, which closes them.
 */

import {
  ExportError,
  type BlockDevice,
  type DeviceGeometry,
  type ExportInfo,
  type ExportProvider,
  type Geometry,
  type Peer,
} from '../block-device.js';
import { completeGeometry, geometryProblem, missingMethod, type ServedDevice } from './geometry.js';
import type { ByteReader } from '../protocol/byte-reader.js';
import type { HandshakeClock } from './handshake-clock.js';
import type { Limits } from './limits.js';
import { LoopSlice } from './loop-slices.js';
import type { TlsMode } from '../protocol/tls.js';
import {
  answerMetaContextOption,
  answerReplyOption,
  beginNegotiation,
  encodeAnswer,
  negotiatedFor,
  type Negotiation,
} from './meta-context.js';
import {
  CLIENT_FLAGS_SIZE,
  decodeString,
  encodeExportNameReply,
  encodeGreeting,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeOptionReply,
  encodeServerEntry,
  encodeString,
  HANDSHAKE_FLAG,
  INFO,
  MAX_PAYLOAD,
  MAX_STRING_BYTES,
  OPT,
  OPTION_HEADER_SIZE,
  OPTION_MAGIC_HIGH,
  OPTION_MAGIC_LOW,
  REP,
  transmissionFlags,
  type Negotiated,
} from '../protocol/wire.js';

/** What the handshake needs of its connection. */
export interface HandshakeHost {
  readonly peer: Peer;
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly reader: ByteReader;
  readonly clock: HandshakeClock;
  readonly isShuttingDown: boolean;
  /** How this peer may, or must, begin TLS. Undefined: this server knows no TLS at all. */
  readonly tlsMode: TlsMode | undefined;
  /** The export that the client was last told it cannot have. */
  refused: string | undefined;
  /** Send `acknowledgement` as the last bytes in the clear and shake hands; `peer` and `reader` are of TLS afterwards. */
  startTls(acknowledgement: Buffer): Promise<void>;
  /** The client has asked for something: it is not idling. */
  advanced(): void;
  /** Resolves when the socket has taken the bytes; fails when it is gone. */
  send(bytes: Buffer): Promise<void>;
  /** Open an export; from then on the connection sees to its closing. */
  open(name: string): Promise<OpenExport>;
  /** Close what `open` gave: the client will not get it. */
  abandon(): Promise<void>;
  unexpected(error: unknown): void;
}

export interface OpenExport {
  readonly device: BlockDevice;
  readonly info: ExportInfo;
}

/** An export that can be announced, and served. */
export interface CheckedExport {
  readonly device: ServedDevice;
  readonly geometry: Geometry;
  readonly info: ExportInfo;
}

/** How a handshake ended: in the transmission phase, or with the connection to be closed after what was sent. */
export type HandshakeOutcome =
  | {
      readonly next: 'transmission';
      readonly negotiated: Negotiated;
      readonly device: ServedDevice;
      readonly geometry: Geometry;
      readonly exportName: string;
    }
  | { readonly next: 'close'; readonly reason: string };

/** Of a list, sent at once: few system calls, and little memory for a client that does not read. */
const LIST_CHUNK_BYTES = 64 * 1024;

/** First two bytes of a TLS connection: a handshake record of TLS 1.0, whatever version is meant. */
const TLS_RECORD = 0x1603;

/** The client broke a MUST, or asked for what can only be refused by closing: the connection ends at once. */
export class HandshakeError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'HandshakeError';
  }
}

/**
 * Lead one client through the handshake.
 * @throws HandshakeError if it breaks the protocol; whatever `host.send` and `host.reader` throw if it vanishes.
 */
export async function negotiate(host: HandshakeHost): Promise<HandshakeOutcome> {
  const { reader, limits } = host;
  await host.send(encodeGreeting(HANDSHAKE_FLAG.FIXED_NEWSTYLE | HANDSHAKE_FLAG.NO_ZEROES));

  const clientFlags = (await reader.read(CLIENT_FLAGS_SIZE)).readUInt32BE(0);
  // "the server MUST drop the TCP connection if the client sets an unknown flag"
  if ((clientFlags & ~(HANDSHAKE_FLAG.FIXED_NEWSTYLE | HANDSHAKE_FLAG.NO_ZEROES)) !== 0) {
    if (clientFlags >>> 16 === TLS_RECORD) {
      throw new HandshakeError('the client speaks TLS from its first byte; in NBD it begins with NBD_OPT_STARTTLS');
    }
    throw new HandshakeError(`unknown client flags 0x${clientFlags.toString(16)}`);
  }
  const flags = {
    fixedNewstyle: (clientFlags & HANDSHAKE_FLAG.FIXED_NEWSTYLE) !== 0,
    noZeroes: (clientFlags & HANDSHAKE_FLAG.NO_ZEROES) !== 0,
  };
  let negotiated = beginNegotiation({ ...flags, tls: false });

  const slice = new LoopSlice();
  for (;;) {
    const isHere = reader.unread >= OPTION_HEADER_SIZE;
    const header = await reader.read(OPTION_HEADER_SIZE);
    // Options that are here already are taken without waiting for anything: others are served in between.
    if (!isHere) slice.restart();
    if (slice.isOver) await slice.next();
    if (host.isShuttingDown) return { next: 'close', reason: 'the server is shutting down' };
    host.advanced();
    host.clock.heard();
    if (header.readUInt32BE(0) !== OPTION_MAGIC_HIGH || header.readUInt32BE(4) !== OPTION_MAGIC_LOW) {
      throw new HandshakeError(`bad option magic 0x${header.toString('hex', 0, 8)}`);
    }
    const option = header.readUInt32BE(8);
    const length = header.readUInt32BE(12);
    if (length > limits.maxDrainedOptionBytes) {
      throw new HandshakeError(`option ${option} with ${length} bytes of data`);
    }
    // Whatever the client's flags said: "Servers MAY choose to honour fixed newstyle from clients that didn't set this bit",
    // as go-nbd does not.
    if (host.tlsMode === 'require' && !negotiated.tls && option !== OPT.STARTTLS && option !== OPT.ABORT) {
      if (option === OPT.EXPORT_NAME) return { next: 'close', reason: 'an export was asked for without TLS' };
      await reader.skip(length);
      await reply(host, option, REP.ERR_TLS_REQD, 'this server speaks with you over TLS only');
      continue;
    }
    if (length > limits.maxOptionBytes) {
      if (option === OPT.EXPORT_NAME) throw new HandshakeError(`an export name of ${length} bytes`);
      await reader.skip(length);
      await reply(host, option, REP.ERR_TOO_BIG, `option data of ${length} bytes, at most ${limits.maxOptionBytes}`);
      continue;
    }
    const data = await reader.read(length);
    if (option === OPT.STARTTLS) {
      // "the server MUST NOT preserve any negotiation state … issued before this command"
      if (await answerStartTls(host, negotiated, data)) negotiated = beginNegotiation({ ...flags, tls: true });
      continue;
    }
    if (option === OPT.LIST) {
      await answerList(host, data);
      continue;
    }
    const outcome = await answerOption(host, negotiated, option, data);
    if (outcome !== undefined) return outcome;
  }
}

/** Whether the connection is in TLS now. One that fails to get there is over: "it is too late to continue without". */
async function answerStartTls(host: HandshakeHost, negotiated: Negotiated, data: Buffer): Promise<boolean> {
  const refuse = (type: number, message: string): Promise<void> => reply(host, OPT.STARTTLS, type, message);
  if (host.tlsMode === undefined) {
    await refuse(REP.ERR_UNSUP, 'this server has no TLS');
  } else if (host.tlsMode === 'off') {
    await refuse(REP.ERR_POLICY, 'TLS is switched off on this server');
  } else if (negotiated.tls) {
    await refuse(REP.ERR_INVALID, 'TLS has begun already');
  } else if (data.length > 0) {
    await refuse(REP.ERR_INVALID, 'NBD_OPT_STARTTLS takes no data');
  } else {
    // A client waits for the answer: what is here already came from somebody who wants it taken for the client's, later.
    if (host.reader.unread > 0) throw new HandshakeError('bytes in the clear after NBD_OPT_STARTTLS');
    await host.startTls(encodeOptionReply(OPT.STARTTLS, REP.ACK));
    return true;
  }
  return false;
}

/** Answer one option; undefined if haggling goes on. */
async function answerOption(
  host: HandshakeHost,
  negotiated: Negotiation,
  option: number,
  data: Buffer,
): Promise<HandshakeOutcome | undefined> {
  switch (option) {
    case OPT.EXPORT_NAME:
      return answerExportName(host, negotiated, data);
    case OPT.ABORT:
      // "the server SHOULD gracefully handle the client … closing the connection without waiting for a reply"
      await reply(host, option, REP.ACK).catch(() => undefined);
      return { next: 'close', reason: whyLeft(host.refused) ?? 'the client aborted the handshake' };
    case OPT.INFO:
      await answerInfo(host, negotiated, data);
      return undefined;
    case OPT.GO:
      return answerGo(host, negotiated, data);
    case OPT.STRUCTURED_REPLY:
    case OPT.EXTENDED_HEADERS:
      await host.send(encodeAnswer(option, answerReplyOption(negotiated, option, data)));
      return undefined;
    case OPT.LIST_META_CONTEXT:
    case OPT.SET_META_CONTEXT:
      await answerMetaContexts(host, negotiated, option, data);
      return undefined;
    default:
      await reply(host, option, REP.ERR_UNSUP, `option ${option} is not supported`);
      return undefined;
  }
}

/** NBD_OPT_EXPORT_NAME has no way to report an error: "the server MUST terminate the session". */
async function answerExportName(host: HandshakeHost, agreed: Negotiation, data: Buffer): Promise<HandshakeOutcome> {
  // "Once extended headers are successfully requested, a client MUST NOT use NBD_OPT_EXPORT_NAME."
  if (agreed.extendedHeaders) throw new HandshakeError('NBD_OPT_EXPORT_NAME after extended headers');
  const name = decodeString(withoutTerminator(data));
  if (name === undefined) throw new HandshakeError('an export name that is not a string');
  let opened: CheckedExport;
  try {
    opened = await openChecked(host, name);
  } catch (error) {
    return { next: 'close', reason: `export ${JSON.stringify(name)} refused: ${refusal(host, error, name).message}` };
  }
  if (host.isShuttingDown) {
    await host.abandon();
    return { next: 'close', reason: 'the server is shutting down' };
  }
  const { device, geometry, info } = opened;
  const negotiated = negotiatedFor(agreed, name);
  const flags = transmissionFlags(geometry, negotiated);
  await host.send(encodeExportNameReply(geometry.size, flags, negotiated.noZeroes));
  return { next: 'transmission', negotiated, device, geometry, exportName: info.name };
}

/** XenServer's tapdisk counts the NUL behind a C string as a part of the name; no name has one. */
function withoutTerminator(name: Buffer): Buffer {
  return name.at(-1) === 0 ? name.subarray(0, -1) : name;
}

async function answerMetaContexts(
  host: HandshakeHost,
  negotiated: Negotiation,
  option: number,
  data: Buffer,
): Promise<void> {
  let asked: string | undefined;
  const describe = async (name: string, contexts: readonly string[]): Promise<Geometry> => {
    asked = name;
    return (await describeExport(host, name, contexts)).geometry;
  };
  let answer;
  try {
    answer = await answerMetaContextOption(negotiated, option, data, describe);
  } catch (error) {
    answer = refusal(host, error, asked);
  }
  await host.send(encodeAnswer(option, answer));
}

/** In slices, and no faster than the client reads: there may be very many. */
async function answerList(host: HandshakeHost, data: Buffer): Promise<void> {
  if (data.length > 0) return reply(host, OPT.LIST, REP.ERR_INVALID, 'NBD_OPT_LIST takes no data');
  const slice = new LoopSlice();
  let count = 0;
  let messages: Buffer[] = [];
  let bytes = 0;
  try {
    const exports = await host.clock.during('listed its exports', host.provider.list(host.peer));
    slice.restart();
    for (const { name, description } of exports) {
      const entry = encodeServerEntry(name, encodeString(description).toString());
      const message = encodeOptionReply(OPT.LIST, REP.SERVER, entry);
      messages.push(message);
      bytes += message.length;
      count++;
      if (bytes >= LIST_CHUNK_BYTES) {
        await host.send(Buffer.concat(messages));
        messages = [];
        bytes = 0;
      }
      if (slice.isOver) await slice.next();
    }
  } catch (error) {
    // Also of the client, that it is gone: whoever sends finds out.
    if (count > 0) throw error;
    const { type, message } = refusal(host, error);
    return reply(host, OPT.LIST, type, message);
  }
  host.clock.listed(count);
  messages.push(encodeOptionReply(OPT.LIST, REP.ACK));
  await host.send(Buffer.concat(messages));
}

async function describeExport(
  host: HandshakeHost,
  name: string,
  contexts?: readonly string[],
): Promise<{ readonly geometry: Geometry; readonly info: ExportInfo }> {
  const asked = host.provider.describe(name, host.peer, contexts);
  const { geometry, info } = await host.clock.during(`described the export ${JSON.stringify(name)}`, asked);
  return { geometry: checkedGeometry(name, geometry), info };
}

async function answerInfo(host: HandshakeHost, agreed: Negotiation, data: Buffer): Promise<void> {
  const query = decodeInfoRequest(data);
  if (query === undefined) {
    await reply(host, OPT.INFO, REP.ERR_INVALID, 'malformed NBD_OPT_INFO');
    return;
  }
  let described: { readonly geometry: Geometry; readonly info: ExportInfo };
  try {
    described = await describeExport(host, query.name);
  } catch (error) {
    const { type, message } = refusal(host, error, query.name);
    await reply(host, OPT.INFO, type, message);
    return;
  }
  const negotiated = negotiatedFor(agreed, query.name);
  await host.send(encodeInfos(OPT.INFO, query.infos, described.geometry, described.info, negotiated));
}

async function answerGo(host: HandshakeHost, agreed: Negotiation, data: Buffer): Promise<HandshakeOutcome | undefined> {
  const query = decodeInfoRequest(data);
  if (query === undefined) {
    await reply(host, OPT.GO, REP.ERR_INVALID, 'malformed NBD_OPT_GO');
    return undefined;
  }
  let opened: CheckedExport;
  try {
    opened = await openChecked(host, query.name);
  } catch (error) {
    const { type, message } = refusal(host, error, query.name);
    await reply(host, OPT.GO, type, message);
    return undefined;
  }
  if (host.isShuttingDown) {
    await host.abandon();
    await reply(host, OPT.GO, REP.ERR_SHUTDOWN, 'the server is shutting down');
    return undefined;
  }
  const { device, geometry, info } = opened;
  const negotiated = negotiatedFor(agreed, query.name);
  await host.send(encodeInfos(OPT.GO, query.infos, geometry, info, negotiated));
  return { next: 'transmission', negotiated, device, geometry, exportName: info.name };
}

/** Data of NBD_OPT_INFO and NBD_OPT_GO; undefined if its lengths do not fit or the name is no string. */
function decodeInfoRequest(data: Buffer): { readonly name: string; readonly infos: ReadonlySet<number> } | undefined {
  if (data.length < 6) return undefined;
  const nameLength = data.readUInt32BE(0);
  if (nameLength > data.length - 6 || nameLength > MAX_STRING_BYTES) return undefined;
  const name = decodeString(data.subarray(4, 4 + nameLength));
  if (name === undefined) return undefined;
  const count = data.readUInt16BE(4 + nameLength);
  const first = 4 + nameLength + 2;
  if (data.length !== first + 2 * count) return undefined;
  const infos = new Set<number>();
  for (let at = first; at < data.length; at += 2) infos.add(data.readUInt16BE(at));
  return { name, infos };
}

/** The whole successful answer: the export always, its block sizes if asked or not default, names if asked; then ACK. */
function encodeInfos(
  option: number,
  wanted: ReadonlySet<number>,
  geometry: Geometry,
  info: ExportInfo,
  negotiated: Negotiated,
): Buffer {
  const infos = [encodeInfoExport(geometry.size, transmissionFlags(geometry, negotiated))];
  // Also unasked: "a server with size constraints other than the default SHOULD advertise" them, and clients must
  // ignore what they do not understand.
  const hasDefaultSizes = geometry.minimumBlockSize === 1;
  if (wanted.has(INFO.BLOCK_SIZE) || !hasDefaultSizes) {
    infos.push(encodeInfoBlockSize(geometry.minimumBlockSize, geometry.preferredBlockSize, MAX_PAYLOAD));
  }
  if (wanted.has(INFO.NAME)) infos.push(encodeInfoText(INFO.NAME, info.name));
  if (wanted.has(INFO.DESCRIPTION)) {
    infos.push(encodeInfoText(INFO.DESCRIPTION, encodeString(info.description).toString()));
  }
  const messages = infos.map((data) => encodeOptionReply(option, REP.INFO, data));
  messages.push(encodeOptionReply(option, REP.ACK));
  return Buffer.concat(messages);
}

/** Open an export and look whether it can be served; if not it is closed again. */
export async function openChecked(
  host: Pick<HandshakeHost, 'clock' | 'open' | 'abandon'>,
  name: string,
): Promise<CheckedExport> {
  const { device, info } = await host.clock.during(`opened the export ${JSON.stringify(name)}`, host.open(name));
  try {
    const geometry = checkedGeometry(name, device.geometry, device);
    return { device: device as ServedDevice, geometry, info };
  } catch (error) {
    await host.abandon();
    throw error;
  }
}

/** With its defaults. @throws Error if it cannot be announced, or `device` cannot do what it announces */
function checkedGeometry(name: string, given: DeviceGeometry, device?: BlockDevice): Geometry {
  const geometry = completeGeometry(given);
  const problem = geometryProblem(geometry) ?? (device && missingMethod(device, geometry));
  if (problem !== undefined) throw new Error(`export ${JSON.stringify(name)} cannot be served: ${problem}`);
  return geometry;
}

/**
 * How an error of the provider is answered, and noted if it is about an export. What is not an ExportError is a bug: reported,
 * its text kept inside.
 */
function refusal(
  host: HandshakeHost,
  error: unknown,
  exportName?: string,
): { readonly type: number; readonly message: string } {
  const isExpected = error instanceof ExportError;
  const message = isExpected ? error.message : 'the export cannot be opened: internal error';
  if (exportName !== undefined) host.refused = exportName;
  if (!isExpected) {
    host.unexpected(error);
    return { type: REP.ERR_UNKNOWN, message };
  }
  const type = {
    UNKNOWN: REP.ERR_UNKNOWN,
    POLICY: REP.ERR_POLICY,
    TLS_REQUIRED: REP.ERR_TLS_REQD,
    SHUTDOWN: REP.ERR_SHUTDOWN,
    FAILED: REP.ERR_UNKNOWN,
  };
  return { type: type[error.code], message };
}

/** Of a client that leaves without an export: undefined if it was refused none. */
export function whyLeft(refused: string | undefined): string | undefined {
  return refused === undefined ? undefined : `the client left when it was refused ${JSON.stringify(refused)}`;
}

function reply(host: HandshakeHost, option: number, type: number, message?: string): Promise<void> {
  return host.send(encodeOptionReply(option, type, message === undefined ? undefined : encodeString(message)));
}
