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
  /** Whether a missing store is created; by default true. */
  readonly mayCreateStore?: boolean;
  /** How long requests to a cluster are repeated while it cannot serve them, ms. */
  readonly retryMs?: number;
  readonly storeOptions?: StoreOptions;
  /** Path of the control socket; by default in the store. */
  readonly control?: string;
  /** Permissions of the control socket. */
  readonly controlMode?: number;
  readonly listeners: readonly ListenAddress[];
  /** Listening sockets from systemd. */
  readonly inherited?: readonly InheritedSocket[];
  readonly security?: SecurityConfiguration;
  /** Serve without TLS also at addresses that other machines can reach. */
  readonly allowPlaintext?: boolean;
  /** How long NAME@now is kept for a client that was cut off; see DEFAULT_KEEP_MS. */
  readonly keepMs?: number;
  /** How long such a client counts as a user of a VDI; see DEFAULT_IN_USE_MS. */
  readonly inUseMs?: number;
  /** Only one connection at a time may write a disk; see exclusive.ts. */
  readonly exclusive?: Exclusive | undefined;
  /** Where they differ from the NBD server's defaults. */
  readonly limits?: Partial<Limits>;
  /** Permissions of unix sockets; by default DEFAULT_SOCKET_MODE. */
  readonly socketMode?: number;
  /** The export of clients that name none; without it they are refused. In a form that parseExportName takes. */
  readonly defaultExport?: string;
  /** VDIs to create if they do not exist. */
  readonly create: readonly { readonly name: string; readonly size: number }[];
  /** Log every request. */
  readonly debug: boolean;
  readonly version: string;
}
