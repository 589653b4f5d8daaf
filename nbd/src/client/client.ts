/** What `nbd-server-ts/client` gives to others: the client, without the server. */

export { NbdClient } from './nbd-client.js';
export type { BlockStatusOptions, CallOptions, ReadOptions, WriteOptions, ZeroOptions } from './nbd-client.js';
export { ReconnectingClient } from './reconnecting-client.js';
export type { ReconnectingClientOptions, ReconnectOptions } from './reconnecting-client.js';
export { copy } from './copy.js';
export type { CopyOptions, CopyProgress } from './copy.js';
export type { CopyClient } from './copy-ends.js';
export type { ClientOptions, ConnectionOptions, ServerAddress } from './client-options.js';
export { NbdClientError, type NbdClientErrorCode } from './client-error.js';
export type { ExportDetails } from './export-details.js';
export type { Extent, ReplyLevel } from './reply-reader.js';
export type { ChangedRange, StatusOptions } from './status-iteration.js';
export type { ClientTls } from '../protocol/tls.js';
export { formatNbdUri, parseNbdUri } from '../protocol/uri.js';
export type { NbdUri, NbdUriParts } from '../protocol/uri.js';
export { ALLOCATION_CONTEXT, STATE_HOLE, STATE_ZERO } from '../block-device.js';
export type { ExportInfo } from '../block-device.js';
/** The longest payload that every server takes. */
export { MAX_PAYLOAD } from '../protocol/wire.js';
