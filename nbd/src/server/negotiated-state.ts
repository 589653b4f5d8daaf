/**
 * A connection after its handshake as a value: all that another server needs to continue it, on another event loop or in
 * another process, besides its socket. It owns that value and the check that an export, opened again, still has what was
 * announced to the client.
 */

import { ExportError, type ExportProvider, type Geometry, type Peer, type PeerCredentials } from '../block-device.js';
import { transmissionFlags, type Negotiated } from '../protocol/wire.js';
import { openChecked } from './checked-export.js';
import { completeGeometry } from '../device.js';
import type { HandshakeClock } from './handshake-clock.js';
import type { HandshakeHost, HandshakeOutcome } from './handshake-host.js';

/** Version of the shape of NegotiatedState: two releases of this library may exchange it. */
export const STATE_VERSION = 1;

/** A connection after its handshake, as plain data: structured clone keeps all of it. */
export interface NegotiatedState {
  readonly version: typeof STATE_VERSION;
  readonly peer: Peer;
  /** The export's own name (ExportInfo.name), which the next server opens. */
  readonly exportName: string;
  readonly negotiated: Negotiated;
  /** What was announced to the client. */
  readonly geometry: Geometry;
  /** Input that was received and not executed, from the start of a request on. */
  readonly unread: Uint8Array;
  /** Replies, or the rest of one, that the system has not sent: the client must receive them first. */
  readonly unsent: Uint8Array;
}

/** Why a connection was not handed over. It continues where it is, unless it is over. */
export class HandOverError extends Error {
  constructor(
    readonly code: 'NOT_READY' | 'TLS' | 'NOT_A_SOCKET' | 'ENDING' | 'ABORTED',
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = 'HandOverError';
  }
}

/** What reopening needs of its connection. */
export interface ReopenHost extends Pick<HandshakeHost, 'export' | 'isShuttingDown'> {
  readonly peer: Peer;
  readonly provider: ExportProvider;
  readonly clock: HandshakeClock;
}

/** Open the export of `state` again, for a connection that continues with it. */
export async function reopen(host: ReopenHost, state: NegotiatedState): Promise<HandshakeOutcome> {
  const { exportName, negotiated } = state;
  const version: number = state.version;
  const close = (why: string): HandshakeOutcome => ({
    next: 'close',
    reason: `it cannot continue with the export ${JSON.stringify(exportName)}: ${why}`,
  });
  if (version !== STATE_VERSION) return close(`its state has version ${version}, not ${STATE_VERSION}`);
  try {
    const { device, geometry, info } = await openChecked(host, exportName);
    const problem = host.isShuttingDown
      ? 'the server is shutting down'
      : ((await missingContext(host, state)) ?? whyNotTheSame(state, geometry));
    if (problem !== undefined) {
      await host.export.close('lost');
      return close(problem);
    }
    return {
      ...{ next: 'transmission', negotiated, device, exportName: info.name },
      // As it was announced, even if the export has become larger or can do more.
      geometry: completeGeometry(state.geometry),
    };
  } catch (error) {
    if (error instanceof ExportError) return close(error.message);
    host.export.unexpected(error);
    return close('internal error');
  }
}

async function missingContext(
  host: ReopenHost,
  { exportName, negotiated }: NegotiatedState,
): Promise<string | undefined> {
  const names = negotiated.metaContexts.map(({ name }) => name);
  if (names.length === 0) return undefined;
  const described = host.provider.describe(exportName, host.peer, names);
  const { geometry } = await host.clock.during(`described the export ${JSON.stringify(exportName)}`, described);
  const missing = names.find((name) => geometry.contexts?.includes(name) !== true);
  return missing === undefined ? undefined : `it no longer has the meta context ${missing}`;
}

/** What `now` lacks of what was announced to the client; undefined if nothing. */
function whyNotTheSame({ geometry: told, negotiated }: NegotiatedState, now: Geometry): string | undefined {
  if (now.size < told.size) return `it has ${now.size} bytes, and had ${told.size}`;
  if (now.readOnly && !told.readOnly) return 'it is read-only now';
  if (now.minimumBlockSize > told.minimumBlockSize) {
    return `its blocks have ${now.minimumBlockSize} bytes, and had ${told.minimumBlockSize}`;
  }
  const lost =
    transmissionFlags(told, negotiated) & ~transmissionFlags({ ...now, readOnly: told.readOnly }, negotiated);
  return lost === 0
    ? undefined
    : `it no longer supports what was announced (transmission flags 0x${lost.toString(16)})`;
}

/** `peer` as plain data: an embedding program's credentials may compute their fields when they are read. */
export function plainPeer(peer: Peer): Peer {
  const { transport, address, host, credentials } = peer;
  return {
    transport,
    address,
    ...(host !== undefined && { host }),
    ...(credentials !== undefined && { credentials: plainCredentials(credentials) }),
  };
}

function plainCredentials({ pid, uid, gid, groups, startTime, command }: PeerCredentials): PeerCredentials {
  return {
    ...{ pid, uid, gid },
    ...(groups !== undefined && { groups: [...groups] }),
    ...(startTime !== undefined && { startTime }),
    ...(command !== undefined && { command }),
  };
}
