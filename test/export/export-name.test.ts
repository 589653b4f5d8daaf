/** The grammar of export names: what each form means, which are refused with which message, and that no two forms collide. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { formatExportName, parseExportName, subjectText } from '../../src/export/export-name.js';
import { CatalogError } from '../../src/vdi/catalog-error.js';
import { checkName, checkTag, formatSpec, parseSpec } from '../../src/vdi/names.js';

describe('an export name', () => {
  for (const [text, subject, since] of [
    ['vm1', { name: 'vm1', tag: undefined }],
    ['vm1@monday', { name: 'vm1', tag: 'monday' }],
    ['vm1@now', { name: 'vm1', tag: 'now' }],
    ['vm1@now:nightly', { name: 'vm1', tag: 'now:nightly' }],
    ['vm1@#7c+1', { name: 'vm1', tag: '#7c+1' }],
    ['vm1@a@b', { name: 'vm1', tag: 'a@b' }],
    ['100%', { name: '100%', tag: undefined }],
    ['@7c2b25', { name: '', tag: undefined, vid: 0x7c2b25 }],
    ['@1', { name: '', tag: undefined, vid: 1 }],
    ['@=a%2Fb', { name: 'a/b', tag: undefined }],
    ['@=a%40b@c@d', { name: 'a@b', tag: 'c@d' }],
    ['@=vm1@now', { name: 'vm1', tag: 'now' }],
    ['vm1/since=monday', { name: 'vm1', tag: undefined }, 'monday'],
    ['vm1@now/since=monday', { name: 'vm1', tag: 'now' }, 'monday'],
    ['vm1@now:x/since=50%25%2C#1', { name: 'vm1', tag: 'now:x' }, '50%,#1'],
    ['vm1@two/since=a=b', { name: 'vm1', tag: 'two' }, 'a=b'],
    ['vm1/since=a/b', { name: 'vm1', tag: undefined }, 'a/b'],
    ['@7c/since=a%20b', { name: '', tag: undefined, vid: 0x7c }, 'a b'],
  ] as const) {
    test(`${JSON.stringify(text)} is ${JSON.stringify(subject)}${since === undefined ? '' : ` since ${since}`}`, () => {
      expect(parseExportName(text)).toEqual({ subject, options: since === undefined ? {} : { since } });
    });
  }

  for (const [text, options] of [
    ['vm1/exclusive', { exclusive: 'unsaid' }],
    ['vm1/exclusive=read-only', { exclusive: 'read-only' }],
    ['vm1/exclusive=refuse', { exclusive: 'refuse' }],
    ['@=a%2Fb/exclusive=take-over', { exclusive: 'take-over' }],
    ['vm1/since=monday,exclusive=refuse', { since: 'monday', exclusive: 'refuse' }],
    ['vm1/exclusive,since=monday', { since: 'monday', exclusive: 'unsaid' }],
  ] as const) {
    test(`${JSON.stringify(text)} has the options ${JSON.stringify(options)}, and is written as the same`, () => {
      expect(parseExportName(text).options).toEqual(options);
      expect(parseExportName(formatExportName(subjectText(text), options)).options).toEqual(options);
    });
  }

  for (const [text, message] of [
    ['', /must not be empty/],
    ['vm1@', /a tag must follow the @/],
    ['@', /there must be a name before the @, or a hexadecimal ID/],
    ['@0', /hexadecimal ID/],
    ['@1000000', /hexadecimal ID/],
    ['@monday', /hexadecimal ID/],
    ['@=', /neither part may be empty/],
    ['@=@x', /neither part may be empty/],
    ['@=a@', /neither part may be empty/],
    ['@=50%', /%25 is a % itself/],
    ['/since=x', /must not be empty/],
    ['vm1/', /"" after the slash is not an option; there are since=TAG and exclusive/],
    [
      'vm1/alone',
      /"alone" after the slash is not an option; there are since=TAG and exclusive.*%2F for the slash, or @ID/,
    ],
    ['vm1/exclusive=', /exclusive= is not valid; give exclusive alone, or with one of read-only, refuse, take-over/],
    ['vm1/exclusive=yes', /exclusive=yes is not valid/],
    ['vm1/exclusive,exclusive', /is given twice/],
    ['vm1/exclusive=refuse,since=a,exclusive', /is given twice/],
    ['vm1/EXCLUSIVE', /"EXCLUSIVE" after the slash is not an option/],
    ['vm1@monday/rw', /"rw" after the slash is not an option/],
    ['vm1/since', /since needs the tag of a snapshot/],
    ['vm1/since=', /since needs the tag of a snapshot/],
    ['vm1/since=a,', /"" after the slash is not an option/],
    ['vm1/since=a,since=a', /is given twice/],
    ['vm1/since=a,b', /"b" after the slash is not an option/],
    ['vm1/since=50%', /%25 is a % itself/],
    ['vm1/since=%fg', /%25 is a % itself/],
    ['vm1/since=now', /a permanent snapshot/],
    ['vm1/since=now:x', /a permanent snapshot/],
    ['vm1/SINCE=x', /"SINCE" after the slash is not an option/],
    ['a/b', /"b" after the slash is not an option.*a slash is written @=NAME@TAG/],
  ] as const) {
    test(`${JSON.stringify(text)} is refused with a message`, () => {
      expect(() => parseExportName(text)).toThrow(message);
      expect(() => parseExportName(text)).toThrow(CatalogError);
    });
  }

  const ours = fc.string({ unit: 'grapheme', minLength: 1, maxLength: 20 }).filter((text) => {
    try {
      return checkTag(text) !== '' && checkName(text) !== '';
    } catch {
      return false;
    }
  });
  const anybodys = fc
    .oneof(ours, fc.string({ unit: fc.constantFrom('a', '/', '@', '%', ',', '=', '#', ' ', '\n', 'ß', '\udcff') }))
    .filter((text) => text !== '');

  test('every allowed name and tag stands for itself, with any characters', () => {
    fc.assert(
      fc.property(ours, ours, (name, tag) => {
        expect(parseExportName(name)).toEqual({ subject: { name, tag: undefined }, options: {} });
        expect(parseExportName(`${name}@${tag}`)).toEqual({ subject: { name, tag }, options: {} });
        expect(formatSpec({ name, tag })).toBe(`${name}@${tag}`);
      }),
    );
  });

  test('every name and tag of other tools has a form that leads back to it', () => {
    fc.assert(
      fc.property(
        anybodys,
        fc.option(anybodys, { nil: undefined }),
        fc.option(ours, { nil: undefined }),
        (name, tag, since) => {
          const text = formatExportName(formatSpec({ name, tag }), { since });
          expect(parseExportName(text)).toEqual({
            subject: { name, tag },
            options: since === undefined ? {} : { since },
          });
          expect(parseSpec(subjectText(text))).toEqual({ name, tag });
          expect(text).not.toMatch(/[\p{Cc}]|^\//u);
        },
      ),
    );
  });
});
