/**
 * The handshake, server side: from the greeting to the transmission phase. It owns the loop over options (proto.md, "Fixed
 * newstyle negotiation", "Option types") and NBD_OPT_STARTTLS. It never touches the socket and leaves nothing open when it
 * fails: the connection closes the device.
 */

import {
  CLIENT_FLAGS_SIZE,
  encodeGreeting,
  encodeOptionReply,
  HANDSHAKE_FLAG,
  OPT,
  OPTION_HEADER_SIZE,
  OPTION_MAGIC_HIGH,
  OPTION_MAGIC_LOW,
  REP,
  type Negotiated,
} from '../protocol/wire.js';
import { answerExportName, answerGo, answerInfo, answerList, answerMetaContexts } from './export-options.js';
import { HandshakeError, type HandshakeHost, type HandshakeOutcome } from './handshake-host.js';
import { LoopSlice } from '../loop-slices.js';
import { answerReplyOption, beginNegotiation, encodeAnswer, reply, type Negotiation } from './negotiation.js';

/** First two bytes of a TLS connection: a handshake record of TLS 1.0, whichever version follows. */
const TLS_RECORD = 0x1603;

/**
 * Lead one client through the handshake.
 * Errors: HandshakeError if the client violates the protocol; those of `host.send` and `host.reader` if it disconnects.
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
    // Options that have arrived already are read without waiting: other connections get their slices in between.
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
    // Whatever the client's flags are: "Servers MAY choose to honour fixed newstyle from clients that didn't set this bit",
    // as go-nbd does not.
    if (host.tlsMode === 'require' && !negotiated.tls && option !== OPT.STARTTLS && option !== OPT.ABORT) {
      if (option === OPT.EXPORT_NAME) return { next: 'close', reason: 'an export was asked for without TLS' };
      await reader.skip(length);
      await reply(host, option, REP.ERR_TLS_REQD, 'this server requires TLS');
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

/**
 * Returns whether the connection is under TLS now. If the TLS handshake fails it ends: "it is too late to continue
 * without".
 */
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
    // A client waits for the answer: bytes that are here already may be injected, to be taken for the client's under TLS.
    if (host.reader.unread > 0) throw new HandshakeError('bytes in the clear after NBD_OPT_STARTTLS');
    await host.startTls(encodeOptionReply(OPT.STARTTLS, REP.ACK));
    return true;
  }
  return false;
}

/** Answer one option; undefined if the handshake continues. */
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
      return { next: 'close', reason: host.export.whyLeft ?? 'the client aborted the handshake' };
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
