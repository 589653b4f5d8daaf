/**
 * What the options of a handshake have agreed on so far, and the answers to those that say nothing about an export: which
 * kind of replies, and whether with extended headers.
 */

import { encodeOptionReply, encodeString, OPT, REP, type Negotiated } from '../protocol/wire.js';
import type { HandshakeHost } from './handshake-host.js';

/** What the options so far have agreed on. */
export type Negotiation = {
  -readonly [Field in keyof Negotiated]: Negotiated[Field];
} & {
  /** The export `metaContexts` were selected for. They count only if the client then opens this one. */
  metaExport: string | undefined;
};

/** Nothing is agreed on but what the client's flags said; also after NBD_OPT_STARTTLS. */
export function beginNegotiation(agreed: Pick<Negotiated, 'fixedNewstyle' | 'noZeroes' | 'tls'>): Negotiation {
  return { ...agreed, structuredReplies: false, extendedHeaders: false, metaContexts: [], metaExport: undefined };
}

/** What holds if `exportName` is the export that is opened, or asked about. */
export function negotiatedFor(negotiation: Negotiation, exportName: string): Negotiated {
  const { metaExport, metaContexts, ...agreed } = negotiation;
  return { ...agreed, metaContexts: metaExport === exportName ? metaContexts : [] };
}

/** An answer to an option: its reply messages, or the error to reply with. */
export type OptionAnswer = Buffer | { readonly type: number; readonly message: string };

/** NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS. Asking twice is answered like asking once. */
export function answerReplyOption(negotiation: Negotiation, option: number, data: Buffer): OptionAnswer {
  if (data.length > 0) return { type: REP.ERR_INVALID, message: `option ${option} takes no data` };
  if (option === OPT.EXTENDED_HEADERS) {
    negotiation.extendedHeaders = true;
  } else if (negotiation.extendedHeaders) {
    return { type: REP.ERR_EXT_HEADER_REQD, message: 'extended headers were negotiated and stay' };
  }
  negotiation.structuredReplies = true;
  return encodeOptionReply(option, REP.ACK);
}

/** The bytes of an answer. */
export function encodeAnswer(option: number, answer: OptionAnswer): Buffer {
  return Buffer.isBuffer(answer) ? answer : encodeOptionReply(option, answer.type, encodeString(answer.message));
}

export function reply(host: HandshakeHost, option: number, type: number, message?: string): Promise<void> {
  return host.send(encodeOptionReply(option, type, message === undefined ? undefined : encodeString(message)));
}
