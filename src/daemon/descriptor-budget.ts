/**
 * Who may have how many of the daemon's descriptors: all of them come out of one budget, so that connections are refused
 * before anybody's reads and writes lack a file. Owns the division, and the words for what the limit allows.
 */
import { DEFAULT_LIMITS } from 'nbd-server-ts';
import { MAX_CONTROL_CONNECTIONS } from '../operations/control-protocol.js';

/**
 * What is open beside the rest: some 30 when nobody is there, 64 sockets of clients that have broken the protocol, folders
 * and logs while they are synced, connections to a cluster's nodes, what an operation of the command line opens.
 */
const RESERVE = 192;
/** Of a low limit no more than one in so many is for that, */
const RESERVE_DIVISOR = 6;
/** and no less than this: all of those sockets, what is open when nobody is there, and what is synced meanwhile. */
const LEAST_RESERVE = 128;
/** With a low limit one in so many is for the control socket. */
const CONTROL_DIVISOR = 32;
const MIN_CONTROL_CONNECTIONS = 8;
/** A connection's socket, and the disk behind it: the log of its map, or the file with a temporary snapshot's blocks. */
const PER_CONNECTION = 2;
/** Of what is left one in so many is for object files, however many connections there may be. */
const OBJECT_FILES_DIVISOR = 4;
/** A moment that is kept for who may come back has no connection: the log of its disk's map, and the file of its blocks. */
const PER_KEPT_MOMENT = 2;
/** Of those for object files one in so many is for a kept moment. */
const KEPT_DIVISOR = 8;
const MAX_KEPT_MOMENTS = 256;
/** With more there is nothing to gain: 256 GiB of disk in use. */
const MAX_OBJECT_FILES = 65_536;
/** Below it nothing works well, and what is above fails in odd places. */
const MIN_DESCRIPTORS = 256;
/** Limits that are named to people are multiples of it. */
const STEP = 128;
/** If the system does not say. */
const ASSUMED_LIMIT = 1024;

export interface DescriptorBudget {
  /** What there is. */
  readonly limit: number;
  /** Connections to the NBD listeners. */
  readonly connections: number;
  readonly controlConnections: number;
  readonly objectFiles: number;
  /** NAME@now whose clients were cut off. */
  readonly keptMoments: number;
  /** The limit that would do for as many connections as were asked for; undefined if this one does. */
  readonly neededLimit: number | undefined;
}

/** `limit`: RLIMIT_NOFILE. `wanted`: connections that are to be possible, if the limit allows. */
export function divideDescriptors(limit = ASSUMED_LIMIT, wanted = DEFAULT_LIMITS.maxConnections): DescriptorBudget {
  const { rest, controlConnections } = withoutReserve(limit);
  const forObjects = Math.floor(rest / OBJECT_FILES_DIVISOR);
  const possible = Math.max(1, Math.floor((rest - forObjects) / PER_CONNECTION));
  const connections = Math.min(wanted, possible);
  const keptMoments = Math.min(MAX_KEPT_MOMENTS, Math.floor(forObjects / KEPT_DIVISOR));
  const left = rest - PER_CONNECTION * connections - PER_KEPT_MOMENT * keptMoments;
  return {
    ...{ limit, connections, controlConnections, objectFiles: Math.min(MAX_OBJECT_FILES, left), keptMoments },
    neededLimit: connections < wanted ? limitFor(wanted) : undefined,
  };
}

/** Why nothing can be served with such a limit; undefined if it can. */
export function tooFew({ limit }: DescriptorBudget): string | undefined {
  if (limit >= MIN_DESCRIPTORS) return undefined;
  return `the limit of ${limit} open files is too low, at least ${MIN_DESCRIPTORS} are needed: see 'ulimit -n', LimitNOFILE=`;
}

/** For whoever starts the daemon: what the limit does not allow, and what would; undefined if it allows all. */
export function shortageOf({ limit, connections, neededLimit }: DescriptorBudget, wanted: number): string | undefined {
  if (neededLimit === undefined) return undefined;
  return (
    `the limit of ${limit} open files allows ${connections} connections, not ${wanted}; further ones are refused. ` +
    `Raise it to ${neededLimit} (LimitNOFILE= of a systemd unit, ulimit -n), or give --max-connections ${connections}`
  );
}

function withoutReserve(limit: number): { readonly rest: number; readonly controlConnections: number } {
  const reserve = Math.min(RESERVE, Math.max(LEAST_RESERVE, Math.floor(limit / RESERVE_DIVISOR)));
  const share = Math.floor(limit / CONTROL_DIVISOR);
  const controlConnections = Math.min(MAX_CONTROL_CONNECTIONS, Math.max(MIN_CONTROL_CONNECTIONS, share));
  return { rest: limit - reserve - controlConnections, controlConnections };
}

/** The least limit with which `wanted` connections are possible. */
function limitFor(wanted: number): number {
  let limit = MIN_DESCRIPTORS;
  const isEnough = (): boolean => {
    const { rest } = withoutReserve(limit);
    return Math.floor((rest - Math.floor(rest / OBJECT_FILES_DIVISOR)) / PER_CONNECTION) >= wanted;
  };
  while (!isEnough()) limit += STEP;
  return limit;
}
