/**
 * Divides the daemon's file descriptors among their users. They all come from one budget, so that new connections are refused before
 * reads and writes lack a file. Owns the division, and the messages about the limit. Opens nothing.
 */
import { DEFAULT_LIMITS } from 'nbd-server-ts';
import { MAX_CONTROL_CONNECTIONS } from '../operations/control-protocol.js';

/**
 * For all else: some 30 descriptors of an idle daemon, 64 sockets of clients that have broken the protocol, directories and logs
 * while they are synced, connections to a cluster's nodes, files that an operation over the control socket opens.
 */
const RESERVE = 192;
/** With a low limit, the reserve is at most one in RESERVE_DIVISOR descriptors, */
const RESERVE_DIVISOR = 6;
/** and at least this: all of those sockets, the descriptors of an idle daemon, and files being synced. */
const LEAST_RESERVE = 128;
/** With a low limit, one in so many descriptors is for the control socket. */
const CONTROL_DIVISOR = 32;
const MIN_CONTROL_CONNECTIONS = 8;
/** A connection's socket, and one file of its disk: the log of its map, or the file with a temporary snapshot's blocks. */
const PER_CONNECTION = 2;
/** Of the rest, one in so many is for object files, whatever the number of connections. */
const OBJECT_FILES_DIVISOR = 4;
/** A temporary snapshot that is kept for a client that was cut off has no connection: the log of its disk's map, its block file. */
const PER_KEPT_MOMENT = 2;
/** There may be one kept snapshot per so many descriptors for object files. */
const KEPT_DIVISOR = 8;
const MAX_KEPT_MOMENTS = 256;
/** More have no benefit: these are enough for 256 GiB of disk in use. */
const MAX_OBJECT_FILES = 65_536;
/** With fewer, the daemon does not start: it would fail in unexpected places. */
const MIN_DESCRIPTORS = 256;
/** Recommended limits are multiples of it. */
const STEP = 128;
/** If the system does not tell its limit. */
const ASSUMED_LIMIT = 1024;

export interface DescriptorBudget {
  /** The limit of open files, RLIMIT_NOFILE. */
  readonly limit: number;
  /** Connections to the NBD listeners. */
  readonly connections: number;
  readonly controlConnections: number;
  readonly objectFiles: number;
  /** Temporary snapshots (NAME@now) whose clients were cut off. */
  readonly keptMoments: number;
  /** The limit that would suffice for the wanted connections; undefined if this one does. */
  readonly neededLimit: number | undefined;
}

/** `limit`: RLIMIT_NOFILE. `wanted`: the number of connections to allow, if the limit suffices. */
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

/** Why the daemon cannot start with this limit; undefined if it can. */
export function tooFew({ limit }: DescriptorBudget): string | undefined {
  if (limit >= MIN_DESCRIPTORS) return undefined;
  return `the limit of ${limit} open files is too low, at least ${MIN_DESCRIPTORS} are needed: see 'ulimit -n', LimitNOFILE=`;
}

/** A warning that the limit does not suffice for `wanted` connections, with the limit that would; undefined if it does. */
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
