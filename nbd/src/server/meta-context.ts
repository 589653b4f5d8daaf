/**
 * Meta contexts in the handshake: what a client may list and select of an export (proto.md, "Metadata querying",
 * NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT). It owns the syntax of queries and the rules of matching; the device
 * answers for the contexts.
 */

import type { Geometry } from '../block-device.js';
import {
  decodeString,
  encodeMetaContext,
  encodeOptionReply,
  MAX_STRING_BYTES,
  OPT,
  REP,
  type SelectedContext,
} from '../protocol/wire.js';
import type { Negotiation, OptionAnswer } from './negotiation.js';

/** Most queries of one option. An export has a handful of contexts, and a client a handful of queries. */
const MAX_QUERIES = 256;
/** Most contexts that one client may select: every block status request is answered for all of them. */
const MAX_SELECTED = 16;

/** `describe` returns the geometry of an export, or throws like ExportProvider.describe; it gets the queries. */
export async function answerMetaContextOption(
  negotiation: Negotiation,
  option: number,
  data: Buffer,
  describe: (name: string, contexts: readonly string[]) => Promise<Geometry>,
): Promise<OptionAnswer> {
  const isSet = option === OPT.SET_META_CONTEXT;
  // "Issuing this command replaces all previously-set metadata contexts (including when this command fails)"
  if (isSet) {
    negotiation.metaContexts = [];
    negotiation.metaExport = undefined;
  }
  // For a list this is only a "SHOULD NOT" of the client, and libnbd lets its user do it.
  if (isSet && !negotiation.structuredReplies) {
    return { type: REP.ERR_INVALID, message: 'meta contexts need structured replies or extended headers first' };
  }
  const request = decodeQueries(data);
  if ('type' in request) return request;
  const geometry = await describe(request.exportName, request.queries);
  const { contexts, wideContexts = [] } = geometry;
  const isAvailable = (name: string): boolean => negotiation.extendedHeaders || !wideContexts.includes(name);

  if (!isSet) {
    const listed = contexts.filter((name) => isAvailable(name) && isListed(name, request.queries));
    // "The metadata context ID in these replies is reserved and SHOULD be set to zero"
    return encodeContexts(
      option,
      listed.map((name) => ({ id: 0, name })),
    );
  }
  // A wildcard is not a name: "the server MUST ignore this form during SET_META_CONTEXT".
  const names = contexts.filter((name) => request.queries.includes(name));
  const unavailable = names.find((name) => !isAvailable(name));
  if (unavailable !== undefined) {
    return { type: REP.ERR_EXT_HEADER_REQD, message: `${unavailable} needs extended headers` };
  }
  if (names.length > MAX_SELECTED) {
    return { type: REP.ERR_TOO_BIG, message: `${names.length} meta contexts, at most ${MAX_SELECTED}` };
  }
  negotiation.metaContexts = names.map((name, index) => ({ id: index + 1, name }));
  negotiation.metaExport = request.exportName;
  return encodeContexts(option, negotiation.metaContexts);
}

/** Without queries everything is listed. A query that ends in a colon matches as a prefix: a namespace, or part of a leaf. */
function isListed(name: string, queries: readonly string[]): boolean {
  return (
    queries.length === 0 || queries.some((query) => name === query || (query.endsWith(':') && name.startsWith(query)))
  );
}

function encodeContexts(option: number, contexts: readonly SelectedContext[]): Buffer {
  const messages = contexts.map(({ id, name }) =>
    encodeOptionReply(option, REP.META_CONTEXT, encodeMetaContext(id, name)),
  );
  return Buffer.concat([...messages, encodeOptionReply(option, REP.ACK)]);
}

function decodeQueries(
  data: Buffer,
): { readonly exportName: string; readonly queries: readonly string[] } | { type: number; message: string } {
  const invalid = (message: string): { type: number; message: string } => ({ type: REP.ERR_INVALID, message });
  let at = 0;
  const takeNumber = (): number | undefined => {
    if (data.length - at < 4) return undefined;
    at += 4;
    return data.readUInt32BE(at - 4);
  };
  const takeString = (): string | undefined => {
    const length = takeNumber();
    if (length === undefined || length > data.length - at || length > MAX_STRING_BYTES) return undefined;
    at += length;
    return decodeString(data.subarray(at - length, at));
  };

  const exportName = takeString();
  const count = takeNumber();
  if (exportName === undefined || count === undefined) return invalid('a malformed export name');
  // Each query has 4 bytes at least: this tells a false count from one that is too high.
  if (count > (data.length - at) / 4) return invalid('fewer queries than announced');
  if (count > MAX_QUERIES) return { type: REP.ERR_TOO_BIG, message: `${count} queries, at most ${MAX_QUERIES}` };
  const queries: string[] = [];
  for (let index = 0; index < count; index++) {
    const query = takeString();
    if (query === undefined) return invalid('a malformed query');
    queries.push(query);
  }
  if (at !== data.length) return invalid('bytes behind the last query');
  return { exportName, queries };
}
