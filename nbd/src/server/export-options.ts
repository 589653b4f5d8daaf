/**
 * The options about exports: LIST, INFO, GO, EXPORT_NAME and the two for meta contexts (proto.md, "Option types"). It owns
 * their data, their answers, and how an error of the provider is told to the client.
 */

import { ExportError, type ExportInfo, type Geometry } from '../block-device.js';
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
import { HandshakeError, type CheckedExport, type HandshakeHost, type HandshakeOutcome } from './handshake-host.js';
import { LoopSlice } from './loop-slices.js';
import { answerMetaContextOption } from './meta-context.js';
import { encodeAnswer, negotiatedFor, reply, type Negotiation } from './negotiation.js';

/** Bytes of a list sent at once: few system calls, and little memory for a client that does not read. */
const LIST_CHUNK_BYTES = 64 * 1024;

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
    return { next: 'close', reason: `export ${JSON.stringify(name)} refused: ${refusal(host, error, name).message}` };
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
    answer = refusal(host, error, asked);
  }
  await host.send(encodeAnswer(option, answer));
}

/** In slices, and no faster than the client reads: there may be very many exports. */
export async function answerList(host: HandshakeHost, data: Buffer): Promise<void> {
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
    // The error may be that the client is gone: the next send will show it.
    if (count > 0) throw error;
    const { type, message } = refusal(host, error);
    return reply(host, OPT.LIST, type, message);
  }
  host.clock.listed(count);
  messages.push(encodeOptionReply(OPT.LIST, REP.ACK));
  await host.send(Buffer.concat(messages));
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
    const { type, message } = refusal(host, error, query.name);
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
    const { type, message } = refusal(host, error, query.name);
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

/**
 * The answer to an error of the provider; it is remembered if it concerns an export. Anything but an ExportError is a bug: it
 * is reported, its text not sent.
 */
function refusal(
  host: HandshakeHost,
  error: unknown,
  exportName?: string,
): { readonly type: number; readonly message: string } {
  const isExpected = error instanceof ExportError;
  const message = isExpected ? error.message : 'the export cannot be opened: internal error';
  if (exportName !== undefined) host.export.refused = exportName;
  if (!isExpected) {
    host.export.unexpected(error);
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
