/**
 * Routes of the control API for the store and its VDIs. Each one calls one of the operations on the store that the daemon has open;
 * the requests of remote-operations.ts arrive here. Decides nothing about VDIs.
 */
import type { Beginning } from '../../operations/operations.js';
import { FILLERS } from '../../store/vdi-record.js';
import {
  badRequest,
  copiesIn,
  first,
  flag,
  hex,
  MAX_OF_DIGITS,
  MAX_RUN_DIGITS,
  offsetIn,
  optionalNumber,
  runIn,
  text,
  wholeNumber,
  type Body,
} from './request-fields.js';
import type { Route } from './route.js';

export const VDI_ROUTES: readonly Route[] = [
  {
    method: 'GET',
    path: ['vdis'],
    answer: ({ operations, query }) => (query.get('details') === '1' ? operations.listDetails() : operations.list()),
  },
  { method: 'GET', path: ['merging'], answer: ({ operations }) => operations.merging() },
  {
    method: 'POST',
    path: ['merging'],
    answer: ({ operations, body }) => operations.merging({ paused: flag(body, 'paused') }),
  },
  { method: 'GET', path: ['damaged'], answer: ({ operations }) => operations.listDamaged() },
  {
    method: 'POST',
    path: ['vdis'],
    answer: ({ operations, body }) =>
      operations.create(text(body, 'name'), wholeNumber(body, 'size'), {
        blockSizeShift: optionalNumber(body, 'blockSizeShift'),
        redundancy: copiesIn(body),
        force: flag(body, 'force'),
      }),
  },
  { method: 'GET', path: ['vdis', '*'], answer: ({ operations, names }) => operations.show(first(names)) },
  {
    method: 'DELETE',
    path: ['vdis', '*'],
    answer: async ({ operations, names, query }) => {
      const options = { force: query.get('force') === '1', run: query.get('run') ?? undefined };
      const result = await operations.remove(first(names), options);
      return result.ended.length > 0 ? result : null;
    },
  },
  {
    method: 'GET',
    path: ['vdis', '*', 'changes'],
    answer: ({ operations, names, query }) =>
      operations.changes(first(names), query.get('since') ?? '', offsetIn(query)),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'resize'],
    answer: ({ operations, names, body }) =>
      operations.resize(first(names), wholeNumber(body, 'size'), {
        force: flag(body, 'force'),
        forceInUse: flag(body, 'forceInUse'),
        run: runIn(body),
      }),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'snapshots'],
    answer: ({ operations, names, body }) =>
      operations.snapshot(first(names), text(body, 'tag'), {
        takenAt: body.takenAt === undefined ? undefined : wholeNumber(body, 'takenAt'),
        force: flag(body, 'force'),
        run: runIn(body),
      }),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'begin'],
    answer: ({ operations, names, body }) => operations.begin(first(names), beginningIn(body)),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'finish'],
    answer: ({ operations, names, body }) => operations.finish(first(names), hex(body, 'run', MAX_RUN_DIGITS)),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'clone'],
    answer: ({ operations, names, body }) =>
      operations.clone(first(names), text(body, 'name'), { force: flag(body, 'force') }),
  },
  {
    method: 'POST',
    path: ['vdis', '*', 'rollback'],
    answer: ({ operations, names, body }) =>
      operations.rollback(first(names), { force: flag(body, 'force'), run: runIn(body) }),
  },
  { method: 'GET', path: ['locks'], answer: ({ operations }) => operations.locks() },
  {
    method: 'POST',
    path: ['vdis', '*', 'unlock'],
    answer: ({ operations, names, body }) =>
      operations.unlock(first(names), { heldBy: body.heldBy === undefined ? undefined : text(body, 'heldBy') }),
  },
  { method: 'GET', path: ['exports', '*'], answer: ({ operations, names }) => operations.describe(first(names)) },
  {
    method: 'POST',
    path: ['check'],
    answer: ({ operations, body }) => operations.check({ repair: flag(body, 'repair') }),
  },
];

function beginningIn(body: Body): Beginning {
  const by = FILLERS.find((each) => each === body.by);
  if (by === undefined) throw badRequest(`"by" must be one of ${FILLERS.join(', ')}, not ${JSON.stringify(body.by)}`);
  const run = hex(body, 'run', MAX_RUN_DIGITS);
  if (run === '') throw badRequest('"run" must not be empty');
  return {
    by,
    of: hex(body, 'of', MAX_OF_DIGITS),
    run,
    size: wholeNumber(body, 'size'),
    blockSizeShift: optionalNumber(body, 'blockSizeShift'),
    likeShift: optionalNumber(body, 'likeShift'),
    largestSize: optionalNumber(body, 'largestSize'),
    isOpenEnded: flag(body, 'isOpenEnded'),
    redundancy: copiesIn(body),
    overwrites: flag(body, 'overwrites'),
    goesOn: flag(body, 'goesOn'),
    force: flag(body, 'force'),
  };
}
