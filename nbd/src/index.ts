/** What the package `nbd-server-ts` gives to others. */

export type {
  Awaitable,
  BlockDevice,
  CompleteDevice,
  DeviceGeometry,
  DeviceErrorCode,
  Ending,
  ExportInfo,
  ExportProvider,
  ExtentSink,
  Geometry,
  Peer,
  PeerCredentials,
  ZeroMode,
} from './block-device.js';
export { ALLOCATION_CONTEXT, DeviceError, ExportError, STATE_HOLE, STATE_ZERO } from './block-device.js';
export { DEFAULT_GRACE_MS, ListenError, NbdServer } from './server/server.js';
export type { BoundAddress, ListenOptions, ServerOptions } from './server/server.js';
export { DEFAULT_LIMITS, MIN_MEMORY_BYTES } from './server/limits.js';
export type { Limits } from './server/limits.js';
export type { MemoryUse } from './server/buffer-pool.js';
export type {
  ConnectionCloseEvent,
  ConnectionInfo,
  ConnectionOpenEvent,
  ConnectionRefusedEvent,
  RequestEvent,
  ServerObserver,
} from './server/observer.js';
export { NbdClient, NbdClientError } from './client/client.js';
export type { ClientOptions, ExportDetails, NbdClientErrorCode, ReadOptions } from './client/client.js';
export type { Extent, ReplyLevel } from './client/reply-reader.js';
export type { ClientTls, ServerTls, TlsIdentity, TlsMaterial, TlsMode } from './protocol/tls.js';
export { MAX_PAYLOAD } from './protocol/wire.js';
