/**
 * The grammar of export names (docs/exports.md):
 *
 *     EXPORT  = SUBJECT [ "/" OPTION { "," OPTION } ]
 *     SUBJECT = NAME [ "@" TAG ]  |  "@" ID  |  "@=" NAME [ "@" TAG ] with percent signs     (src/vdi/names.ts)
 *     OPTION  = KEY [ "=" VALUE ], the VALUE with percent signs
 *
 * Our names and tags have no slash, so what follows the first slash are options, and future options have a place. Owns
 * parsing and formatting; looks nothing up.
 */
import { CatalogError } from '../vdi/catalog-error.js';
import { EXCLUSIVE_FORM, formatExclusive, OTHERWISE, parseOtherwise, type Exclusive } from './exclusive.js';
import { decodePercent, encodePercent, isTemporaryTag, parseSpec, type VdiSpec } from '../vdi/names.js';

export interface ExportOptions {
  /** Tag of the one snapshot that changes are reported since. */
  readonly since?: string;
  /** No other client may write it. */
  readonly exclusive?: Exclusive;
}

export interface ExportName {
  readonly subject: VdiSpec;
  readonly options: ExportOptions;
}

const OPTIONS_BEGIN = '/';
const OPTIONS_SEPARATOR = ',';
/** For messages: all options and their forms. */
const KNOWN_OPTIONS = `since=TAG and ${EXCLUSIVE_FORM}`;

/** The text before the options: the subject. */
export function subjectText(exportName: string): string {
  const slash = exportName.indexOf(OPTIONS_BEGIN);
  return slash < 0 ? exportName : exportName.slice(0, slash);
}

/** Errors: BAD_NAME (the subject or an option is wrong). */
export function parseExportName(exportName: string): ExportName {
  const text = subjectText(exportName);
  const subject = parseSpec(text);
  if (text.length === exportName.length) return { subject, options: {} };
  return { subject, options: parseOptions(exportName, exportName.slice(text.length + 1)) };
}

function parseOptions(exportName: string, text: string): ExportOptions {
  const bad = (why: string): CatalogError =>
    new CatalogError('BAD_NAME', `export ${JSON.stringify(exportName)}: ${why}`);
  const options: { since?: string; exclusive?: Exclusive } = {};
  for (const option of text.split(OPTIONS_SEPARATOR)) {
    const equals = option.indexOf('=');
    const key = equals < 0 ? option : option.slice(0, equals);
    const value = equals < 0 ? undefined : decodePercent(option.slice(equals + 1), bad);
    if (key === 'since') {
      if (options.since !== undefined)
        throw bad('the option since is given twice; changes are reported since one snapshot');
      options.since = sinceValue(value, bad);
    } else if (key === 'exclusive') {
      if (options.exclusive !== undefined) throw bad('the option exclusive is given twice');
      options.exclusive = exclusiveValue(value, bad);
    } else {
      throw bad(
        `${JSON.stringify(key)} after the slash is not an option; there are ${KNOWN_OPTIONS}; a VDI whose name or tag has a ` +
          'slash is written @=NAME@TAG with %2F for the slash, or @ID with its hexadecimal ID',
      );
    }
  }
  return options;
}

function sinceValue(value: string | undefined, bad: (why: string) => CatalogError): string {
  if (!value) throw bad('since needs the tag of a snapshot: since=TAG');
  if (isTemporaryTag(value)) throw bad('since needs a permanent snapshot: a temporary one ends with its last reader');
  return value;
}

function exclusiveValue(value: string | undefined, bad: (why: string) => CatalogError): Exclusive {
  if (value === undefined) return 'unsaid';
  const otherwise = parseOtherwise(value);
  if (otherwise === undefined) {
    throw bad(`exclusive=${value} is not valid; give exclusive alone, or with one of ${OTHERWISE.join(', ')}`);
  }
  return otherwise;
}

/** The inverse of parseExportName. `subject`: from formatSpec or specOf. */
export function formatExportName(subject: string, { since, exclusive }: ExportOptions = {}): string {
  const options = [
    ...(since === undefined ? [] : [`since=${encodePercent(since)}`]),
    ...(exclusive === undefined ? [] : [formatExclusive(exclusive)]),
  ];
  return options.length === 0 ? subject : `${subject}${OPTIONS_BEGIN}${options.join(OPTIONS_SEPARATOR)}`;
}

/**
 * The form that access rules match: NAME, NAME@TAG. An @ within a NAME, which only other tools' VDIs have, becomes a NUL, which
 * no name can have: a VDI named "vm1@x" is not the snapshot x of vm1.
 */
export function accessName({ name, tag }: Pick<VdiSpec, 'name' | 'tag'>): string {
  const plain = name.replaceAll('@', '\0');
  return tag === undefined ? plain : `${plain}@${tag}`;
}
