/** What a daemon is started with. Types only: cli/serve.ts fills them in from its options. */
import type { Limits } from 'nbd-server-ts';
import type { Exclusive } from '../export/exclusive.js';
import type { StoreOptions } from '../store/locations.js';
import type { ListenAddress } from './listen-address.js';
import type { SecurityConfiguration } from './security/security.js';
import type { InheritedSocket } from './systemd.js';

export interface DaemonConfiguration {
  /** A directory, or a cluster's location. */
  readonly store: string;
  /** Whether a store is made where there is none; true if not given. */
  readonly mayCreateStore?: boolean;
  /** How long requests to a cluster are repeated while it cannot serve them. */
  readonly retryMs?: number;
  readonly storeOptions?: StoreOptions;
  /** By default in the store. */
  readonly control?: string;
  /** Permissions of the control socket. */
  readonly controlMode?: number;
  readonly listeners: readonly ListenAddress[];
  /** Sockets that listen already, from systemd. */
  readonly inherited?: readonly InheritedSocket[];
  readonly security?: SecurityConfiguration;
  /** Listen in the clear also where others than this machine can reach it. */
  readonly allowPlaintext?: boolean;
  /** How long NAME@now is kept for a client that was cut off; see DEFAULT_KEEP_MS. */
  readonly keepMs?: number;
  /** How long such a client counts as a user of a VDI; see DEFAULT_IN_USE_MS. */
  readonly inUseMs?: number;
  /** Each disk is written by one connection at a time; see exclusive.ts. */
  readonly exclusive?: Exclusive | undefined;
  /** Bounds other than the NBD server's own. */
  readonly limits?: Partial<Limits>;
  /** By default DEFAULT_SOCKET_MODE. */
  readonly socketMode?: number;
  /** The export of clients that name none; without it they are refused. A name that parseExportName takes. */
  readonly defaultExport?: string;
  /** VDIs to make if they do not exist. */
  readonly create: readonly { readonly name: string; readonly size: number }[];
  /** Log every request. */
  readonly debug: boolean;
  readonly version: string;
}
