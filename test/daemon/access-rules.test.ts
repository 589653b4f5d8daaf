/** The access file: the meaning of its lines, the errors for wrong ones, and what a peer gets to see. */
import { describe, expect, test } from 'vitest';
import { ExportError, type CompleteDevice, type Geometry, type Peer } from 'nbd-server-ts';
import { AccessRules, parseAccess } from '../../src/daemon/security/access-rules.js';
import { AuthorisedExports, type SubjectExports } from '../../src/export/authorised-exports.js';
import { subjectText } from '../../src/export/export-name.js';
import { formatSpec, parseSpec } from '../../src/vdi/names.js';

const FILE = '/etc/sheepgate/access';

function rules(text: string, offersTls = false): AccessRules {
  return new AccessRules(parseAccess(text, FILE), { offersTls });
}

function tcp(host: string, tls?: Partial<NonNullable<Peer['tls']>>): Peer {
  const proven = tls && { protocol: 'TLSv1.3', cipher: 'c', certificateNames: [], ...tls };
  return { transport: 'tcp', address: `${host}:4242`, host, ...(proven && { tls: proven }) };
}

function unix(uid: number, gid = uid, groups: readonly number[] = []): Peer {
  return { transport: 'unix', address: '/run/nbd.sock', credentials: { pid: 1, uid, gid, groups } };
}

const LOCAL = tcp('127.0.0.1');
const CERT = tcp('192.0.2.7', { certificateNames: ['backup', 'backup.example'] });
const ALICE = tcp('192.0.2.7', { pskUser: 'alice' });

describe('one rule', () => {
  const table: readonly (readonly [rule: string, name: string, peer: Peer, access: string])[] = [
    ['allow vm1 from any', 'vm1', LOCAL, 'read-write'],
    ['allow vm1 from any', 'vm1', unix(1000), 'read-write'],
    ['allow vm1 from any', 'vm10', LOCAL, 'refused'],
    ['allow vm1 from any', 'vm1@now', LOCAL, 'refused'],
    ['allow vm1 from any', 'xvm1', LOCAL, 'refused'],
    ['allow vm1 ro from any', 'vm1', LOCAL, 'read-only'],
    ['deny vm1 from any', 'vm1', LOCAL, 'refused'],
    // Patterns.
    ['allow * from any', '', LOCAL, 'read-write'],
    ['allow * from any', 'a\nb', LOCAL, 'read-write'],
    ['allow vm* from any', 'vm', LOCAL, 'read-write'],
    ['allow vm* from any', 'vm1@now:x', LOCAL, 'read-write'],
    ['allow *@now from any', 'vm1@now', LOCAL, 'read-write'],
    ['allow *@now from any', 'vm1@now:x', LOCAL, 'refused'],
    ['allow a*b*c from any', 'a1b2c', LOCAL, 'read-write'],
    ['allow a*b*c from any', 'abc', LOCAL, 'read-write'],
    ['allow a*b*c from any', 'acb', LOCAL, 'refused'],
    ['allow a*a from any', 'a', LOCAL, 'refused'],
    ['allow aa*aa from any', 'aaa', LOCAL, 'refused'],
    ['allow a**b from any', 'axb', LOCAL, 'read-write'],
    ['allow v.1 from any', 'vm1', LOCAL, 'refused'],
    ['allow my%20disk from any', 'my disk', LOCAL, 'read-write'],
    ['allow 100%25 from any', '100%', LOCAL, 'read-write'],
    ['allow %2A from any', '*', LOCAL, 'read-write'],
    ['allow %2A from any', 'x', LOCAL, 'refused'],
    ['allow Dïsk from any', 'Dïsk', LOCAL, 'read-write'],
    // Addresses.
    ['allow * from addr:127.0.0.1', 'x', LOCAL, 'read-write'],
    ['allow * from addr:127.0.0.0/8', 'x', LOCAL, 'read-write'],
    ['allow * from addr:127.0.0.2', 'x', LOCAL, 'refused'],
    ['allow * from addr:10.0.0.0/8', 'x', tcp('10.255.0.1'), 'read-write'],
    ['allow * from addr:10.0.0.0/8', 'x', tcp('11.0.0.1'), 'refused'],
    ['allow * from addr:10.1.2.3/8', 'x', tcp('10.9.9.9'), 'read-write'],
    ['allow * from addr:0.0.0.0/0', 'x', tcp('8.8.8.8'), 'read-write'],
    ['allow * from addr:0.0.0.0/0', 'x', tcp('2001:db8::1'), 'refused'],
    ['allow * from addr:0.0.0.0/0', 'x', unix(0), 'refused'],
    ['allow * from addr:2001:db8::/32', 'x', tcp('2001:db8:1::2'), 'read-write'],
    ['allow * from addr:2001:db8::/32', 'x', tcp('2001:db9::2'), 'refused'],
    ['allow * from addr:fe80::/10', 'x', tcp('fe80::1%eth0'), 'read-write'],
    ['allow * from addr:::1', 'x', tcp('::1'), 'read-write'],
    ['allow * from addr:127.0.0.1', 'x', { transport: 'tcp', address: 'unknown:0', host: 'unknown' }, 'refused'],
    // Users.
    ['allow * from uid:1000', 'x', unix(1000), 'read-write'],
    ['allow * from uid:1000', 'x', unix(0), 'refused'],
    ['allow * from uid:0', 'x', unix(0), 'read-write'],
    ['allow * from uid:0', 'x', LOCAL, 'refused'],
    ['allow * from uid:0', 'x', { transport: 'unix', address: '/s' }, 'refused'],
    ['allow * from gid:44', 'x', unix(1000, 44), 'read-write'],
    ['allow * from gid:44', 'x', unix(1000, 1000, [4, 44]), 'read-write'],
    ['allow * from gid:44', 'x', unix(44, 1000), 'refused'],
    // What TLS proves.
    ['allow * from cert:backup', 'x', CERT, 'read-write'],
    ['allow * from cert:backup.example', 'x', CERT, 'read-write'],
    ['allow * from cert:back', 'x', CERT, 'refused'],
    ['allow * from cert:backup', 'x', ALICE, 'refused'],
    ['allow * from cert:backup', 'x', LOCAL, 'refused'],
    ['allow * from cert:Backup%20Host', 'x', tcp('::1', { certificateNames: ['Backup Host'] }), 'read-write'],
    ['allow * from psk:alice', 'x', ALICE, 'read-write'],
    ['allow * from psk:alice', 'x', CERT, 'refused'],
    ['allow * from psk:bob', 'x', ALICE, 'refused'],
    // To write alone.
    ['allow x exclusive from any', 'x', LOCAL, 'exclusive'],
    ['allow x exclusive=read-only from any', 'x', LOCAL, 'exclusive=read-only'],
    ['allow x exclusive=refuse from any', 'x', LOCAL, 'exclusive=refuse'],
    ['allow x exclusive=take-over from any', 'x', LOCAL, 'exclusive=take-over'],
    ['allow exclusive from any', 'exclusive', LOCAL, 'read-write'],
    // Several.
    ['allow * from psk:bob uid:5 psk:alice', 'x', ALICE, 'read-write'],
    ['allow * from psk:alice+addr:192.0.2.0/24', 'x', ALICE, 'read-write'],
    ['allow * from psk:alice+addr:10.0.0.0/8', 'x', ALICE, 'refused'],
    ['allow * from psk:bob+addr:192.0.2.0/24', 'x', ALICE, 'refused'],
  ];
  for (const [rule, name, peer, access] of table) {
    const who = JSON.stringify(peer.credentials ?? peer.tls ?? peer.host ?? peer.address);
    test(`"${rule}": ${JSON.stringify(name)} is ${access} for ${who}`, () => {
      expect(rules(rule).decide(name, peer)).toBe(access);
    });
  }
});

describe('several rules', () => {
  test('the first rule that matches decides, and without a match the peer is refused', () => {
    const file = rules(`
      # Backups read everything but the vault.
      deny  vault*  from any        # nobody
      allow vm1     from uid:1000
      allow *  ro   from uid:1000 uid:1001
    `);
    const seen = (name: string, peer: Peer): string => file.decide(name, peer);
    expect(seen('vault', unix(1000))).toBe('refused');
    expect(seen('vm1', unix(1000))).toBe('read-write');
    expect(seen('vm1', unix(1001))).toBe('read-only');
    expect(seen('vm2', unix(1000))).toBe('read-only');
    expect(seen('vm2', unix(1002))).toBe('refused');
  });

  test('a file with comments only refuses every client', () => {
    expect(rules('# nothing\n\n   \r\n').decide('x', unix(0))).toBe('refused');
  });

  test('lines may end as on Windows', () => {
    expect(rules('allow x from any\r\nallow y from any\r\n').decide('y', LOCAL)).toBe('read-write');
  });

  test('a peer in the clear learns that TLS is needed only where TLS could help', () => {
    const text = 'deny no from any\nallow a from cert:x\nallow b from psk:y+addr:10.0.0.0/8\nallow c from uid:1\n';
    const offered = rules(text, true);
    expect(offered.decide('a', LOCAL)).toBe('needs-tls');
    expect(offered.decide('b', tcp('10.1.1.1'))).toBe('needs-tls');
    expect(offered.decide('b', LOCAL)).toBe('refused');
    for (const name of ['c', 'no', 'other']) expect(offered.decide(name, LOCAL)).toBe('refused');
    expect(offered.decide('a', CERT)).toBe('refused');
    expect(rules(text, false).decide('a', LOCAL)).toBe('refused');
    // A rule for every client below it still lets in a peer without TLS.
    expect(rules('allow a from cert:x\nallow a ro from any', true).decide('a', LOCAL)).toBe('read-only');
  });

  test('a pattern of many stars takes no time to fail on a long name', () => {
    const file = rules(`allow ${'*a'.repeat(200)}*b from any`);
    const begun = performance.now();
    expect(file.decide('a'.repeat(4096), LOCAL)).toBe('refused');
    expect(performance.now() - begun).toBeLessThan(1000);
  });
});

describe('a wrong line', () => {
  const table: readonly (readonly [string, RegExp])[] = [
    ['permit x from any', /"permit" does not begin a rule; write allow EXPORT \[ro\|exclusive.*\] from SOURCE/],
    ['allow', /no export after "allow"/],
    ['allow x', /the rule ends where "from" must be/],
    ['allow x rw from any', /"rw" stands where "from" must be/],
    ['allow x from', /no source after "from"; give one or more of any, cert:NAME/],
    ['deny x ro from any', /a deny rule has no "ro"/],
    ['deny x exclusive from any', /a deny rule has no "exclusive"/],
    ['allow x exclusive=no from any', /after exclusive= comes one of read-only, refuse, take-over/],
    ['allow x exclusive= from any', /after exclusive= comes one of/],
    ['allow x ro exclusive from any', /"exclusive" stands where "from" must be/],
    ['allow x from everybody', /source "everybody": is not one of any, cert:NAME/],
    ['allow x from user:1', /is not one of/],
    ['allow x from any+', /source "": is not one of/],
    ['allow x from cert:', /a name must follow "cert:"/],
    ['allow x from uid:root', /"root" is not a number; give what 'id -u' prints/],
    ['allow x from gid:-1', /'id -g'/],
    ['allow x from uid:99999999999', /is not a number/],
    ['allow x from addr:host.example', /"host\.example" is not an IP address; give 192\.0\.2\.7/],
    ['allow x from addr:10.0.0.0/33', /"33" is not a prefix length; give 0 to 32/],
    ['allow x from addr:10.0.0.0/', /"" is not a prefix length/],
    ['allow x from addr:::/129', /give 0 to 128/],
    ['allow 50% from any', /write %25 for a % itself/],
    ['allow x from cert:%zz', /write %25/],
  ];
  for (const [line, message] of table) {
    test(`"${line}" is an error that names file and line`, () => {
      const attempt = (): unknown => parseAccess(`allow ok from any\n\n${line}\n`, FILE);
      expect(attempt).toThrow(message);
      expect(attempt).toThrow(new RegExp(`^${FILE}:3: `));
    });
  }
});

describe('exports behind rules', () => {
  const geometry: Geometry = {
    ...{ size: 1024, minimumBlockSize: 1, preferredBlockSize: 4096, readOnly: false, canFlush: true, canFua: true },
    ...{
      canTrim: true,
      canZero: true,
      canFastZero: true,
      canCache: true,
      multiConn: true,
      rotational: false,
      contexts: [],
    },
  };
  const calls: string[] = [];
  const device: CompleteDevice = {
    geometry,
    read: () => void calls.push('read'),
    write: () => void calls.push('write'),
    zero: () => void calls.push('zero'),
    trim: () => void calls.push('trim'),
    flush: () => void calls.push('flush'),
    cache: () => void calls.push('cache'),
    extents: () => void calls.push('extents'),
    close: () => void calls.push('close'),
  };
  const asked: string[] = [];
  /** By id: a VDI that may be opened, one that may not, and one whose name looks like a snapshot's. */
  const ids = new Map<string, { name: string; tag: string | undefined }>([
    ['@1', { name: 'a', tag: undefined }],
    ['@2', { name: 'vault', tag: 'one' }],
    ['@3', { name: 'c', tag: undefined }],
    ['@4', { name: 'a@monday', tag: undefined }],
  ]);
  const provider: SubjectExports = {
    subjectOf: (name) => {
      const text = subjectText(name);
      try {
        const { vid, ...subject } = parseSpec(text);
        return Promise.resolve(vid === undefined ? subject : ids.get(text));
      } catch (error) {
        return Promise.reject(new ExportError('UNKNOWN', (error as Error).message));
      }
    },
    list: (_peer, isTold) =>
      ['a', 'b', 'c']
        .filter((name) => isTold?.({ name, tag: undefined }) ?? true)
        .map((name) => ({ name, description: '' })),
    describe: (name) => {
      asked.push(name);
      const { name: vdi } = ids.get(subjectText(name)) ?? parseSpec(subjectText(name));
      const contexts = [
        'base:allocation',
        'sheepgate:changed:monday',
        'qemu:dirty-bitmap:monday',
        'sheepgate:changed:x',
      ];
      return { geometry: vdi === 'd' ? { ...geometry, contexts } : geometry, info: { name, description: '' } };
    },
    open: (name) => {
      asked.push(name);
      const subject = ids.get(subjectText(name));
      return { device, info: { name: subject ? formatSpec(subject) : name, description: '' } };
    },
  };
  const guarded = new AuthorisedExports(
    provider,
    rules(
      'allow a from any\nallow b ro from any\nallow c from psk:x\nallow a@* ro from any\n' +
        'allow d from any\nallow d@monday from any',
      true,
    ),
  );

  test('only exports that may be opened are listed', async () => {
    expect([...(await guarded.list(LOCAL))].map(({ name }) => name)).toEqual(['a', 'b']);
  });

  test('an export that may not be opened is refused without looking whether it exists', async () => {
    asked.length = 0;
    for (const name of ['x', 'y']) {
      await expect(guarded.open(name, LOCAL)).rejects.toMatchObject({ name: 'ExportError', code: 'POLICY' });
      await expect(guarded.describe(name, LOCAL)).rejects.toMatchObject({ code: 'POLICY' });
    }
    await expect(guarded.open('c', LOCAL)).rejects.toMatchObject({ code: 'TLS_REQUIRED' });
    expect(asked).toEqual([]);
  });

  test('a read-only export is marked read-only and refuses every change, even if the server did not', async () => {
    expect((await guarded.describe('b', LOCAL)).geometry).toMatchObject({ readOnly: true, canTrim: false });
    expect((await guarded.describe('a', LOCAL)).geometry).toBe(geometry);
    const { device: readOnly } = await guarded.open('b', LOCAL);
    expect(readOnly.geometry).toMatchObject({ readOnly: true, canZero: false, canFua: false, size: 1024 });
    calls.length = 0;
    const mode = { noHole: false, fua: false, fastZero: false };
    expect(() => readOnly.write(0, Buffer.alloc(1), false)).toThrow('may only read');
    expect(() => readOnly.zero(0, 1, mode)).toThrow('may only read');
    expect(() => readOnly.trim(0, 1, false)).toThrow('may only read');
    await readOnly.read(0, Buffer.alloc(1));
    await readOnly.flush();
    await readOnly.cache(0, 1);
    await readOnly.extents('base:allocation', 0, 1, () => true);
    await readOnly.close('disconnect');
    expect(calls).toEqual(['read', 'flush', 'cache', 'extents', 'close']);
  });

  const refusalOf = async (name: string): Promise<{ code: string; message: string }> => {
    asked.length = 0;
    const errors = await Promise.all(
      [guarded.open(name, LOCAL), guarded.describe(name, LOCAL)].map((attempt) =>
        attempt.then(
          () => new Error('let in'),
          (error: unknown) => error as Error,
        ),
      ),
    );
    expect(asked).toEqual([]);
    expect(errors[0]).toEqual(errors[1]);
    const { code, message } = errors[0] as Error & { code: string };
    return { code, message: message.replace(JSON.stringify(name), 'EXPORT') };
  };

  test('no form of a name bypasses a rule: options, percent signs and ids are resolved first', async () => {
    for (const name of [
      'a',
      'a/since=monday',
      '@1',
      '@=a',
      '@=%61',
      'a@monday',
      '@=a@%6Donday',
      '@=%61/since=monday',
    ]) {
      await guarded.open(name, LOCAL);
      await guarded.describe(name, LOCAL);
    }
    for (const name of ['vault', 'vault/since=a', 'vault/a', 'vault@one', '@=vault', '@=v%61ult@one', 'c@now', 'x@a']) {
      expect(await refusalOf(name), name).toEqual({ code: 'POLICY', message: 'you are not allowed to open EXPORT' });
    }
    for (const name of ['c', '@=c', 'c/since=x']) expect((await refusalOf(name)).code, name).toBe('TLS_REQUIRED');
    // Not the snapshot "monday" of a, which may be opened.
    expect((await refusalOf('@=a%40monday')).code).toBe('POLICY');
  });

  test('an unknown id is refused like the id of an export that the peer may not open, or that needs TLS', async () => {
    const message = 'you are not allowed to open EXPORT, or there is nothing with this id';
    for (const id of ['@2', '@3', '@4', '@5', '@2/since=x', '@5/since=x']) {
      expect(await refusalOf(id), id).toEqual({ code: 'POLICY', message });
    }
  });

  test('only peers that may open a snapshot get the changes since it, by option or by context', async () => {
    await guarded.open('d/since=monday', LOCAL);
    expect((await refusalOf('d/since=x')).code).toBe('POLICY');
    expect((await refusalOf('d/since=nothing')).code).toBe('POLICY');
    expect((await guarded.describe('d', LOCAL)).geometry.contexts).toEqual([
      'base:allocation',
      'sheepgate:changed:monday',
      'qemu:dirty-bitmap:monday',
    ]);
  });

  test('only peers that may open the export learn that an option is wrong', async () => {
    asked.length = 0;
    await guarded.open('a/alone', LOCAL);
    expect(asked).toEqual(['a/alone']);
    expect((await refusalOf('vault/alone')).code).toBe('POLICY');
  });

  test('an id that leads elsewhere when it is opened is closed again and refused', async () => {
    const { open } = provider;
    provider.open = (name) => ({ device, info: { name: 'vault', description: name } });
    calls.length = 0;
    await expect(guarded.open('@1', LOCAL)).rejects.toMatchObject({ code: 'POLICY' });
    expect(calls).toEqual(['close']);
    provider.open = open;
  });

  test("the daemon's own connections are let through", async () => {
    const own: Peer = { transport: 'internal', address: 'session' };
    expect([...(await guarded.list(own))]).toHaveLength(3);
    expect((await guarded.open('b', own)).device).toBe(device);
  });
});
