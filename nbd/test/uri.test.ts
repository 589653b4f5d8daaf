/** NBD URIs: what they mean, what they are refused for, and that the tools of other projects read the same. */

import { execFile } from 'node:child_process';
import { basename, dirname } from 'node:path';
import { promisify } from 'node:util';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { formatNbdUri, parseNbdUri, type NbdUri } from '../src/index.js';
import { TestExport } from './test-device.js';
import { startServer } from './test-server.js';

const run = promisify(execFile);

describe('parseNbdUri', () => {
  const tcp = { transport: 'tcp', host: 'h', port: 10809, exportName: '', tls: false } as const;
  const unix = { transport: 'unix', path: '/run/a.sock', exportName: '', tls: false } as const;
  const MEANINGS: [uri: string, parts: NbdUri][] = [
    // Those of the specification.
    ['nbd://example.com:10809/export', { ...tcp, host: 'example.com', exportName: 'export' }],
    ['nbd+unix:///export?socket=nbd.sock', { ...unix, path: 'nbd.sock', exportName: 'export' }],
    ['nbd://h/disk', { ...tcp, exportName: 'disk' }],
    ['nbd+unix:///disk?socket=sock', { ...unix, path: 'sock', exportName: 'disk' }],
    ['nbd://h/', tcp],
    ['nbd://h', tcp],
    ['nbd://h//disk', { ...tcp, exportName: '/disk' }],
    ['nbd://h/hello%20world', { ...tcp, exportName: 'hello world' }],
    ['nbd+unix:///?socket=%00/abstract', { ...unix, path: '\0/abstract' }],
    // Hosts and ports.
    ['nbd://h:1/', { ...tcp, port: 1 }],
    ['nbd://h:/', tcp],
    ['nbd://127.0.0.1:0', { ...tcp, host: '127.0.0.1', port: 0 }],
    ['nbd://[::1]', { ...tcp, host: '::1' }],
    ['nbd://[2001:db8::7]:65535/x', { ...tcp, host: '2001:db8::7', port: 65535, exportName: 'x' }],
    ['nbd://[fe80::1%25eth0]:1/', { ...tcp, host: 'fe80::1%eth0', port: 1 }],
    ['nbd:///x', { ...tcp, host: 'localhost', exportName: 'x' }],
    ['NBD://h', tcp],
    // Names.
    ['nbd://h/a/b/../c', { ...tcp, exportName: 'a/b/../c' }],
    ['nbd://h/a%2Fb%3Fc%23d%25', { ...tcp, exportName: 'a/b?c#d%' }],
    ['nbd://h/gr%C3%B6%C3%9Fe', { ...tcp, exportName: 'größe' }],
    ['nbd://h/größe☃', { ...tcp, exportName: 'größe☃' }],
    ['nbd://h/a+b', { ...tcp, exportName: 'a+b' }],
    ['nbd://h/vm1@monday', { ...tcp, exportName: 'vm1@monday' }],
    // Sockets.
    ['nbd+unix://?socket=/run/a.sock', unix],
    ['nbd+unix:///?socket=/run/a+b%26c%20d.sock', { ...unix, path: '/run/a+b&c d.sock' }],
    // TLS.
    ['nbds://h', { ...tcp, tls: true }],
    ['nbds+unix:///?socket=/run/a.sock', { ...unix, tls: true }],
    ['nbds://alice@h', { ...tcp, tls: true, tlsUsername: 'alice' }],
    ['nbds+unix://a%40b@/?socket=/run/a.sock', { ...unix, tls: true, tlsUsername: 'a@b' }],
    ['nbds://h?tls-username=alice', { ...tcp, tls: true, tlsUsername: 'alice' }],
    [
      'nbds://h/?tls-type=psk&tls-psk-file=/k&tls-hostname=n&tls-verify-peer=0&tls-certificates=/c',
      {
        ...{ ...tcp, tls: true, tlsType: 'psk', tlsPskFile: '/k' },
        ...{ tlsHostname: 'n', tlsVerifyPeer: false, tlsCertificates: '/c' },
      },
    ],
    ['nbd://h/?x-mine=1&x-other', { ...tcp, extra: { 'x-mine': '1', 'x-other': '' } }],
  ];
  for (const [uri, parts] of MEANINGS) {
    test(`reads ${uri}`, () => {
      expect(parseNbdUri(uri)).toEqual(parts);
    });
  }

  const MISTAKES: [uri: string, message: RegExp][] = [
    ['', /"" is not an NBD URI: expected nbd:\/\/HOST/],
    ['disk', /expected nbd:\/\/HOST/],
    ['/run/a.sock', /expected/],
    ['http://h/', /expected/],
    ['nbdx://h/', /expected/],
    ['nbd:h', /expected/],
    ['nbd:unix:/run/a.sock', /expected/],
    ['nbd:h:10809:exportname=x', /expected/],
    [' nbd://h', /expected/],
    ['nbd://h/a b', /a blank as %20/],
    ['nbd://h/a\n', /a blank as %20/],
    ['nbd://h/a#b', /"#" is written %23/],
    ['nbd://h/50%', /the name of the export is not percent-encoded UTF-8/],
    ['nbd://h/%ff', /the name of the export is not percent-encoded UTF-8/],
    ['nbd://h/a%00b', /cannot contain NUL/],
    [`nbd://h/${'a'.repeat(4097)}`, /has 4097 bytes, at most 4096/],
    [`nbd://h/${'%C3%B6'.repeat(2049)}`, /has 4098 bytes, at most 4096/],
    ['nbd://h:65536/', /"65536" is not a port/],
    ['nbd://h:-1/', /"-1" is not a port/],
    ['nbd://h:nbd/', /"nbd" is not a port/],
    ['nbd://h:1x/', /"1x" is not a port/],
    ['nbd://::1/', /in brackets: \[::1\]/],
    ['nbd://[::1/', /in brackets/],
    ['nbd://[::1]x/', /in brackets/],
    ['nbd://[h]/', /"h" is not an address of IPv6/],
    ['nbd://[127.0.0.1]/', /"127.0.0.1" is not an address of IPv6/],
    ['nbd://a%2Fb/', /"a%2Fb" is not a host/],
    ['nbd://h?socket=/run/a.sock', /belongs to nbd\+unix/],
    ['nbd+unix:///disk', /socket is missing: \?socket=PATH/],
    ['nbd+unix:///disk?socket=', /socket is missing/],
    ['nbd+unix:///disk?socket', /socket is missing/],
    ['nbd+unix://disk?socket=a', /"disk" stands in its place: write three slashes/],
    ['nbd+unix:///?socket=a%00b', /NUL after its beginning/],
    ['nbd+unix:///?socket=a&socket=b', /parameter socket twice/],
    ['nbd://h?tls-type=tls', /tls-type is anon, x509 or psk/],
    ['nbd://h?tls-verify-peer=yes', /tls-verify-peer is 0 or 1/],
    ['nbd://h?sokket=a', /unknown parameter "sokket"; known are socket/],
    ['nbds://alice@h?tls-username=bob', /two user names/],
  ];
  for (const [uri, message] of MISTAKES) {
    test(`refuses ${JSON.stringify(uri.slice(0, 80))}`, () => {
      expect(() => parseNbdUri(uri)).toThrow(RangeError);
      expect(() => parseNbdUri(uri)).toThrow(message);
    });
  }

  test('refuses what is not a string', () => {
    for (const value of [undefined, null, 1, {}, ['nbd://h'], new URL('nbd://h')]) {
      expect(() => parseNbdUri(value as string)).toThrow(TypeError);
    }
  });

  test('its messages are short and printable, whatever was given', () => {
    try {
      parseNbdUri(`nbd://\x1b[31m${'x'.repeat(10_000)}`);
    } catch (error) {
      expect((error as Error).message.length).toBeLessThan(400);
      expect((error as Error).message).not.toMatch(/[\x00-\x1f]/);
    }
  });
});

describe('formatNbdUri', () => {
  for (const [parts, uri] of [
    [{}, 'nbd://localhost/'],
    [{ port: 1, exportName: 'a/b c' }, 'nbd://localhost:1/a/b%20c'],
    [{ host: '::1', port: 10809 }, 'nbd://[::1]/'],
    [{ host: 'fe80::1%eth0', tls: true, tlsUsername: 'a@b' }, 'nbds://a%40b@[fe80::1%25eth0]/'],
    [{ path: 'ram.sock', exportName: 'ram' }, 'nbd+unix:///ram?socket=ram.sock'],
    [
      { path: '/run/a&b.sock', tls: true, tlsVerifyPeer: true },
      'nbds+unix:///?socket=/run/a%26b.sock&tls-verify-peer=1',
    ],
  ] as const) {
    test(`writes ${uri}`, () => {
      expect(formatNbdUri(parts)).toBe(uri);
    });
  }

  test('refuses parts that no URI can express', () => {
    expect(() => formatNbdUri({ port: 65536 })).toThrow(RangeError);
    expect(() => formatNbdUri({ port: 0.5 })).toThrow(RangeError);
    expect(() => formatNbdUri({ path: '' })).toThrow(RangeError);
    expect(() => formatNbdUri({ exportName: 'a\0' })).toThrow(RangeError);
    expect(() => formatNbdUri({ exportName: '\ud800' })).toThrow(RangeError);
    expect(() => formatNbdUri({ host: 'a b' })).toThrow(RangeError);
    expect(() => formatNbdUri({ extra: { mine: '1' } })).toThrow(RangeError);
    expect(() => formatNbdUri({ transport: 'unix' } as never)).toThrow(RangeError);
    expect(() => formatNbdUri({ exportName: 1 } as never)).toThrow(TypeError);
  });

  test('any parts are the same after parsing', () => {
    const text = fc.string({ unit: 'grapheme', maxLength: 40 }).filter((one) => !one.includes('\0'));
    const common = {
      exportName: text,
      tls: fc.boolean(),
      tlsUsername: fc.option(text, { nil: undefined }),
      tlsHostname: fc.option(text, { nil: undefined }),
    };
    const tcp = fc.record({
      ...{ transport: fc.constant('tcp' as const), host: fc.oneof(fc.domain(), fc.ipV4(), fc.ipV6()) },
      ...{ port: fc.nat(65535), ...common },
    });
    const path = text.filter((one) => one !== '');
    const unix = fc.record({ transport: fc.constant('unix' as const), path, ...common });
    fc.assert(
      fc.property(fc.oneof(tcp, unix), (parts) => {
        expect(parseNbdUri(formatNbdUri(parts))).toEqual(parts);
      }),
    );
  });

  test('any text is read or refused with a RangeError', () => {
    const piece = fc.constantFrom(
      'nbd',
      's',
      '+unix',
      '://',
      '/',
      '[',
      ']',
      '::1',
      '%',
      '%25',
      '%00',
      '@',
      '?',
      '&',
      '=',
    );
    const word = fc.constantFrom('socket', 'tls-type', 'x-a', 'ß', '#', ':', '10809', '\ud800', ' ', 'h');
    const texts = fc.array(fc.oneof(piece, word), { maxLength: 14 }).map((parts) => parts.join(''));
    fc.assert(
      fc.property(
        fc.oneof(
          texts,
          texts.map((text) => `nbd://${text}`),
          fc.string({ unit: 'binary' }),
        ),
        (uri) => {
          try {
            expect(formatNbdUri(parseNbdUri(uri))).toMatch(/^nbds?(\+unix)?:\/\//);
          } catch (error) {
            expect(error).toBeInstanceOf(RangeError);
          }
        },
      ),
      { numRuns: 2000 },
    );
  });
});

test('nbdinfo understands the URIs of odd names as we do', async () => {
  for (const exportName of ['', 'a b', 'größe ☃', 'a/b', '/x', '50%', 'a?b#c&d=e+f@g:h', "~!*'()"]) {
    const { path } = await startServer({ exports: [new TestExport(exportName)] });
    for (const socket of [path, basename(path)]) {
      const uri = formatNbdUri({ path: socket, exportName });
      const { stdout } = await run('nbdinfo', ['--size', uri], { cwd: dirname(path) });
      expect(stdout.trim()).toBe('1048576');
    }
  }
});
