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
  OpenContext,
  Peer,
  PeerCredentials,
  Transferred,
  ZeroMode,
} from './block-device.js';
export { ALLOCATION_CONTEXT, DeviceError, ExportError, STATE_HOLE, STATE_ZERO } from './block-device.js';
export { completeDevice } from './device.js';
export type { AnyDevice, Device } from './device.js';
export { DEFAULT_GRACE_MS, NbdServer } from './server/server.js';
export { ListenError } from './server/listening.js';
export type { BoundAddress, ListenOptions } from './server/listening.js';
export { ConnectionLoop } from './server/connection-loop.js';
export type { AcceptedStream, ConnectionLoopOptions } from './server/connection-loop.js';
export type {
  AcceptedConnection,
  Progress,
  ServedConnection,
  ServingLoop,
  TakeConnection,
} from './server/serving-loop.js';
export { HandOverError, STATE_VERSION } from './server/negotiated-state.js';
export type { NegotiatedState } from './server/negotiated-state.js';
export type { ServerOptions } from './server/server.js';
export { DEFAULT_LIMITS, MIN_MEMORY_BYTES } from './server/limits.js';
export type { Limits } from './server/limits.js';
export type { Occupant } from './server/admission.js';
export type { OffenderCounts, Violation } from './server/offenders.js';
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
export type { ClientTls } from './protocol/tls.js';
export type { TlsIdentity } from './protocol/tls-identity.js';
export type { ServerTls, TlsMaterial, TlsMode } from './protocol/tls-material.js';
export type { ClientCertificate, NameAttribute, SubjectAltName } from './protocol/x509.js';
export type { Negotiated, SelectedContext } from './protocol/wire.js';
export { MAX_PAYLOAD } from './protocol/wire.js';
