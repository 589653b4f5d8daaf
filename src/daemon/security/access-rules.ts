/**
 * The access file (docs/access.md): which clients may open which exports, to write, to read, or exclusively. Owns its syntax and the
 * decision. Trusts only what the kernel or a TLS handshake has proven about a peer.
 */
import net from 'node:net';
import type { Peer } from 'nbd-server-ts';
import type { Access, AccessPolicy } from '../../export/authorised-exports.js';
import { EXCLUSIVE_FORM, OTHERWISE, parseOtherwise } from '../../export/exclusive.js';
import { decodePercent } from '../../vdi/names.js';
import { OperationError } from '../../operations/operations.js';

/** One condition of a rule on a peer. */
export type Source =
  | { readonly kind: 'any' }
  | { readonly kind: 'cert' | 'psk'; readonly name: string }
  | { readonly kind: 'addr'; readonly network: net.BlockList }
  | { readonly kind: 'uid' | 'gid'; readonly id: number };

/** The texts between the stars, in order. */
export type Pattern = readonly string[];

export interface AccessRule {
  readonly line: number;
  readonly allows: Exclude<Access, 'needs-tls'>;
  readonly pattern: Pattern;
  /** One of the sources must match the peer, with all of its parts. */
  readonly sources: readonly (readonly Source[])[];
}

/** More are a mistake, and cost time at every NBD_OPT_LIST. */
const MAX_RULES = 10_000;
/** Words are quoted in messages. Names of certificates and keys have at most 256 bytes, each written as %XX. */
const MAX_WORD_CHARS = 4096;
const MAX_ID = 0xffff_fffe;

const FORM = `allow EXPORT [ro|${EXCLUSIVE_FORM}] from SOURCE...  or  deny EXPORT from SOURCE...`;
const SOURCES = 'any, cert:NAME, psk:USER, addr:ADDRESS[/BITS], uid:N, gid:N';

export class AccessRules implements AccessPolicy {
  readonly rules: readonly AccessRule[];
  readonly #offersTls: boolean;

  /** `offersTls`: a peer that is refused in the clear might be let in over TLS. */
  constructor(rules: readonly AccessRule[], options: { readonly offersTls: boolean }) {
    this.rules = rules;
    this.#offersTls = options.offersTls;
  }

  /** The first rule that matches decides; if none does, the peer is refused. */
  decide(exportName: string, peer: Peer): Access {
    let couldOverTls = false;
    for (const { pattern, sources, allows } of this.rules) {
      if (!matches(pattern, exportName)) continue;
      if (sources.some((parts) => parts.every((part) => fits(part, peer)))) {
        return allows === 'refused' && couldOverTls ? 'needs-tls' : allows;
      }
      couldOverTls ||=
        this.#offersTls &&
        peer.tls === undefined &&
        allows !== 'refused' &&
        sources.some((parts) => parts.some(isProvenByTls) && parts.every((p) => isProvenByTls(p) || fits(p, peer)));
    }
    return couldOverTls ? 'needs-tls' : 'refused';
  }
}

/** Parse an access file. Errors: ACCESS (with file and line, the mistake, and a correct form). */
export function parseAccess(text: string, file: string): AccessRule[] {
  const rules: AccessRule[] = [];
  for (const [index, full] of text.split('\n').entries()) {
    const line = index + 1;
    const words = full
      .replace(/(^|\s)#.*$/, '')
      .trim()
      .split(/\s+/);
    if (words[0] === '') continue;
    try {
      rules.push(parseRule(words, line));
    } catch (error) {
      if (!(error instanceof RuleError)) throw error;
      throw new OperationError('ACCESS', `${file}:${line}: ${error.message}`);
    }
    if (rules.length > MAX_RULES) {
      throw new OperationError('ACCESS', `${file}:${line}: more than ${MAX_RULES} rules; put several sources into one`);
    }
  }
  return rules;
}

/** A mistake in a rule, without file and line. */
class RuleError extends Error {}

function parseRule(words: readonly string[], line: number): AccessRule {
  const long = words.find(({ length }) => length > MAX_WORD_CHARS);
  if (long !== undefined) throw new RuleError(`a word of ${long.length} characters; no name has so many`);
  const [verb, pattern, ...rest] = words;
  if (verb !== 'allow' && verb !== 'deny') throw new RuleError(`"${verb}" does not begin a rule; write ${FORM}`);
  if (pattern === undefined) throw new RuleError(`no export after "${verb}"; write ${FORM}`);
  const access = parseHow(rest[0]);
  if (access !== undefined && verb === 'deny') throw new RuleError(`a deny rule has no "${rest[0]}"; leave it out`);
  if (access !== undefined) rest.shift();
  if (rest[0] !== 'from') {
    const found = rest[0] === undefined ? 'the rule ends' : `"${rest[0]}" stands`;
    throw new RuleError(`${found} where "from" must be; write ${FORM}`);
  }
  const sources = rest.slice(1).map((source) => source.split('+').map(parseSource));
  if (sources.length === 0) throw new RuleError(`no source after "from"; give one or more of ${SOURCES}`);
  return {
    line,
    allows: verb === 'deny' ? 'refused' : (access ?? 'read-write'),
    pattern: parsePattern(pattern),
    sources,
  };
}

/** The word between export and "from"; undefined without one. Errors: RuleError. */
function parseHow(word = ''): AccessRule['allows'] | undefined {
  if (word === 'ro') return 'read-only';
  if (word === 'exclusive') return 'exclusive';
  if (!word.startsWith('exclusive=')) return undefined;
  const otherwise = parseOtherwise(word.slice('exclusive='.length));
  if (otherwise === undefined) throw new RuleError(`"${word}": after exclusive= comes one of ${OTHERWISE.join(', ')}`);
  return `exclusive=${otherwise}`;
}

/** `*` matches any text, also an empty one; all other characters match themselves. */
function parsePattern(text: string): Pattern {
  return text.split('*').map(decode);
}

/** Not a regular expression, which could take exponential time on a long name from a client. */
function matches(pattern: Pattern, name: string): boolean {
  const first = pattern[0] ?? '';
  const last = pattern.at(-1) ?? '';
  if (pattern.length === 1) return name === first;
  if (name.length < first.length + last.length || !name.startsWith(first) || !name.endsWith(last)) return false;
  let at = first.length;
  for (const part of pattern.slice(1, -1)) {
    const found = name.indexOf(part, at);
    if (found < 0) return false;
    at = found + part.length;
  }
  return at <= name.length - last.length;
}

function parseSource(text: string): Source {
  if (text === 'any') return { kind: 'any' };
  const colon = text.indexOf(':');
  const kind = text.slice(0, Math.max(colon, 0));
  const value = text.slice(colon + 1);
  const problem = (what: string): RuleError => new RuleError(`source "${text}": ${what}`);
  switch (kind) {
    case 'cert':
    case 'psk':
      if (value === '') throw problem(`a name must follow "${kind}:"`);
      return { kind, name: decode(value) };
    case 'uid':
    case 'gid':
      if (!/^\d{1,10}$/.test(value) || Number(value) > MAX_ID) {
        throw problem(`"${value}" is not a number; give what 'id -${kind === 'uid' ? 'u' : 'g'}' prints`);
      }
      return { kind, id: Number(value) };
    case 'addr':
      return { kind, network: parseNetwork(value, problem) };
    default:
      throw problem(`is not one of ${SOURCES}`);
  }
}

function parseNetwork(text: string, problem: (what: string) => RuleError): net.BlockList {
  const slash = text.indexOf('/');
  const address = slash < 0 ? text : text.slice(0, slash);
  const version = net.isIP(address);
  if (version === 0) throw problem(`"${address}" is not an IP address; give 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32`);
  const family = version === 4 ? 'ipv4' : 'ipv6';
  const network = new net.BlockList();
  if (slash < 0) {
    network.addAddress(address, family);
    return network;
  }
  const bits = text.slice(slash + 1);
  const most = version === 4 ? 32 : 128;
  if (!/^\d{1,3}$/.test(bits) || Number(bits) > most) {
    throw problem(`"${bits}" is not a prefix length; give 0 to ${most}`);
  }
  network.addSubnet(address, Number(bits), family);
  return network;
}

/** Decode %XX: %20 is a blank, %2B a plus, %2A a star, which have a meaning otherwise. */
function decode(text: string): string {
  return decodePercent(
    text,
    () => new RuleError(`"${text}": a % must be followed by two hexadecimal digits; write %25 for a % itself`),
  );
}

function fits(source: Source, peer: Peer): boolean {
  switch (source.kind) {
    case 'any':
      return true;
    case 'cert':
      return peer.tls?.certificateNames.includes(source.name) ?? false;
    case 'psk':
      return peer.tls?.pskUser === source.name;
    case 'addr': {
      const host = peer.host?.replace(/%.*$/, ''); // without the zone of a link-local address
      if (host === undefined) return false;
      const version = net.isIP(host);
      return version !== 0 && source.network.check(host, version === 4 ? 'ipv4' : 'ipv6');
    }
    case 'uid':
      return peer.credentials?.uid === source.id;
    case 'gid':
      return peer.credentials?.gid === source.id || (peer.credentials?.groups?.includes(source.id) ?? false);
  }
}

function isProvenByTls(source: Source): boolean {
  return source.kind === 'cert' || source.kind === 'psk';
}
