/** The meaning of store locations, before a store is open. */
import path from 'node:path';
import { expect, test } from 'vitest';
import { CLUSTER, directoryOf, kindOf, LOCAL, parseLocation } from '../../src/store/locations.js';

test('a directory of any name is a local store', () => {
  expect(parseLocation('disks')).toBe(path.resolve('disks'));
  expect(parseLocation('local:disks')).toBe(path.resolve('disks'));
  expect(parseLocation('local:cluster:x')).toBe(path.resolve('cluster:x'));
  expect(parseLocation('./cluster:x')).toBe(path.resolve('cluster:x'));
  expect(kindOf(path.resolve('cluster:x'))).toBe(LOCAL);
  expect(directoryOf('/disks')).toBe('/disks');
});

test('nodes are a cluster, with "cluster:" before them or as a daemon names them', () => {
  const location = 'sheepdog://node1:7000,[::1]:7001';
  expect(parseLocation('cluster:node1,[::1]:7001')).toBe(location);
  expect(parseLocation(location)).toBe(location);
  expect(kindOf(location)).toBe(CLUSTER);
  expect(directoryOf(location)).toBeUndefined();
  expect(() => parseLocation('cluster:::1')).toThrow(expect.objectContaining({ code: 'ADDRESS' }));
});
