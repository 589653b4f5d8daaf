/**
 * The options about exports: LIST, INFO, GO, EXPORT_NAME and the two for meta contexts (proto.md, "Option types"). It owns
 * their data and their answers.
 */

import type { Awaitable, ExportInfo, Geometry } from '../block-device.js';
import {
  decodeString,
  encodeExportNameReply,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeOptionReply,
  encodeServerEntry,
  encodeString,
  INFO,
  MAX_PAYLOAD,
  MAX_STRING_BYTES,
  OPT,
  REP,
  transmissionFlags,
  type Negotiated,
} from '../protocol/wire.js';
import { describeExport, openChecked } from './checked-export.js';
import { checkedInfo } from './export-info.js';
import { refusal } from './export-refusal.js';
import { HandshakeError, type CheckedExport, type HandshakeHost, type HandshakeOutcome } from './handshake-host.js';
import { LoopSlice } from '../loop-slices.js';
import { answerMetaContextOption } from './meta-context.js';
import { encodeAnswer, negotiatedFor, reply, type Negotiation } from './negotiation.js';

/** Bytes of a list sent at once: few system calls, and little memory for a client that does not read. */
const LIST_CHUNK_BYTES = 64 * 1024;
/** Most entries of a list that are left out because they have no name that can be sent: a list may have no end. */
const MAX_UNFIT = 1000;

/** NBD_OPT_EXPORT_NAME has no way to report an error: "the server MUST terminate the session". */
export async function answerExportName(
  host: HandshakeHost,
  agreed: Negotiation,
  data: Buffer,
): Promise<HandshakeOutcome> {
  // "Once extended headers are successfully requested, a client MUST NOT use NBD_OPT_EXPORT_NAME."
  if (agreed.extendedHeaders) throw new HandshakeError('NBD_OPT_EXPORT_NAME after extended headers');
  const name = decodeString(withoutTerminator(data));
  if (name === undefined) throw new HandshakeError('an export name that is not a string');
  let opened: CheckedExport;
  try {
    opened = await openChecked(host, name);
  } catch (error) {
    return {
      next: 'close',
      reason: `export ${JSON.stringify(name)} refused: ${refusal(host, error, 'open', name).message}`,
    };
  }
  if (host.isShuttingDown) {
    await host.export.close('lost');
    return { next: 'close', reason: 'the server is shutting down' };
  }
  const { device, geometry, info } = opened;
  const negotiated = negotiatedFor(agreed, name);
  const flags = transmissionFlags(geometry, negotiated);
  await host.send(encodeExportNameReply(geometry.size, flags, negotiated.noZeroes));
  return { next: 'transmission', negotiated, device, geometry, exportName: info.name };
}

/** XenServer's tapdisk counts the NUL of a C string as part of the name; no name contains one. */
function withoutTerminator(name: Buffer): Buffer {
  return name.at(-1) === 0 ? name.subarray(0, -1) : name;
}

export async function answerMetaContexts(
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
    answer = refusal(host, error, 'describe', asked);
  }
  await host.send(encodeAnswer(option, answer));
}

/** In slices, and no faster than the client reads: there may be very many exports. */
export async function answerList(host: HandshakeHost, data: Buffer): Promise<void> {
  if (data.length > 0) return reply(host, OPT.LIST, REP.ERR_INVALID, 'NBD_OPT_LIST takes no data');
  const slice = new LoopSlice();
  let count = 0;
  let unfit = 0;
  let messages: Buffer[] = [];
  let bytes = 0;
  let isSending = false;
  let isBegun = false;
  try {
    const listed = host.export.list(host.peer) as Awaitable<Iterable<unknown>>;
    const exports = await host.clock.during('listed its exports', listed);
    slice.restart();
    for (const each of exports) {
      const info = listable(host, each, unfit);
      if (info === undefined) {
        if (++unfit > MAX_UNFIT) throw new Error(`more than ${MAX_UNFIT} of its entries cannot be listed`);
        continue;
      }
      const entry = encodeServerEntry(info.name, encodeString(info.description).toString());
      const message = encodeOptionReply(OPT.LIST, REP.SERVER, entry);
      messages.push(message);
      bytes += message.length;
      count++;
      if (bytes >= LIST_CHUNK_BYTES) {
        isSending = true;
        await host.send(Buffer.concat(messages));
        isSending = false;
        isBegun = true;
        messages = [];
        bytes = 0;
      }
      if (slice.isOver) await slice.next();
    }
  } catch (error) {
    // The client is gone.
    if (isSending) throw error;
    const { type, message } = refusal(host, error, 'list');
    // After the first entries the client could take an error for the end of the list.
    if (isBegun) throw new Error(`the list of exports ended with an error: ${message}`, { cause: error });
    return reply(host, OPT.LIST, type, message);
  }
  host.clock.listed(count);
  messages.push(encodeOptionReply(OPT.LIST, REP.ACK));
  await host.send(Buffer.concat(messages));
}

/** An entry of the provider's list as it can be sent; undefined, and the first one is reported, if it cannot be. */
function listable(host: HandshakeHost, entry: unknown, unfitSoFar: number): ExportInfo | undefined {
  try {
    return checkedInfo(entry);
  } catch (error) {
    if (unfitSoFar === 0) host.export.failed(error, { source: 'provider', method: 'list', peer: host.peer });
    return undefined;
  }
}

export async function answerInfo(host: HandshakeHost, agreed: Negotiation, data: Buffer): Promise<void> {
  const query = decodeInfoRequest(data);
  if (query === undefined) {
    await reply(host, OPT.INFO, REP.ERR_INVALID, 'malformed NBD_OPT_INFO');
    return;
  }
  let described: { readonly geometry: Geometry; readonly info: ExportInfo };
  try {
    described = await describeExport(host, query.name);
  } catch (error) {
    const { type, message } = refusal(host, error, 'describe', query.name);
    await reply(host, OPT.INFO, type, message);
    return;
  }
  const negotiated = negotiatedFor(agreed, query.name);
  await host.send(encodeInfos(OPT.INFO, query.infos, described.geometry, described.info, negotiated));
}

export async function answerGo(
  host: HandshakeHost,
  agreed: Negotiation,
  data: Buffer,
): Promise<HandshakeOutcome | undefined> {
  const query = decodeInfoRequest(data);
  if (query === undefined) {
    await reply(host, OPT.GO, REP.ERR_INVALID, 'malformed NBD_OPT_GO');
    return undefined;
  }
  let opened: CheckedExport;
  try {
    opened = await openChecked(host, query.name);
  } catch (error) {
    const { type, message } = refusal(host, error, 'open', query.name);
    await reply(host, OPT.GO, type, message);
    return undefined;
  }
  if (host.isShuttingDown) {
    await host.export.close('lost');
    await reply(host, OPT.GO, REP.ERR_SHUTDOWN, 'the server is shutting down');
    return undefined;
  }
  const { device, geometry, info } = opened;
  const negotiated = negotiatedFor(agreed, query.name);
  await host.send(encodeInfos(OPT.GO, query.infos, geometry, info, negotiated));
  return { next: 'transmission', negotiated, device, geometry, exportName: info.name };
}

/** Data of NBD_OPT_INFO and NBD_OPT_GO; undefined if its lengths do not fit or the name is not a string. */
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

/**
 * The whole successful answer: the export always, its block sizes if requested or not default, names if requested; then
 * ACK.
 */
function encodeInfos(
  option: number,
  wanted: ReadonlySet<number>,
  geometry: Geometry,
  info: ExportInfo,
  negotiated: Negotiated,
): Buffer {
  const infos = [encodeInfoExport(geometry.size, transmissionFlags(geometry, negotiated))];
  // Also without a request: "a server with size constraints other than the default SHOULD advertise" them, and clients must
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
