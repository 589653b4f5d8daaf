/**
 * What the options of a handshake have agreed on so far, and the answers to the options that concern no export: structured
 * replies and extended headers.
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

/** The state at the beginning, and after NBD_OPT_STARTTLS: only the client's flags are agreed on. */
export function beginNegotiation(agreed: Pick<Negotiated, 'fixedNewstyle' | 'noZeroes' | 'tls'>): Negotiation {
  return { ...agreed, structuredReplies: false, extendedHeaders: false, metaContexts: [], metaExport: undefined };
}

/** What was negotiated for the export `exportName`. */
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
    return {
      type: REP.ERR_EXT_HEADER_REQD,
      message: 'extended headers are negotiated already, and replies stay extended',
    };
  }
  negotiation.structuredReplies = true;
  return encodeOptionReply(option, REP.ACK);
}

/** An answer as bytes. */
export function encodeAnswer(option: number, answer: OptionAnswer): Buffer {
  return Buffer.isBuffer(answer) ? answer : encodeOptionReply(option, answer.type, encodeString(answer.message));
}

export function reply(host: HandshakeHost, option: number, type: number, message?: string): Promise<void> {
  return host.send(encodeOptionReply(option, type, message === undefined ? undefined : encodeString(message)));
}
