/**
 * Numbers of the Sheepdog wire protocol, version 2, with the names its headers give them (sheepdog_proto.h,
 * internal_proto.h). Owns no behaviour and no byte offset: structures are in the files beside this one.
 */

export const DEFAULT_PORT = 7000;
/** SD_PROTO_VER, for opcodes below INTERNAL_OPCODES, and SD_SHEEP_PROTO_VER for those from there on. */
export const PROTO_VER = 0x02;
export const SHEEP_PROTO_VER = 0x0a;
export const INTERNAL_OPCODES = 0x80;
/** SD_SHEEP_PROTO_VER of 0.8 and 0.9. Their inodes, objects, names and places are those of 1.0. */
export const OLD_SHEEP_PROTO_VER = 0x09;
/** The known versions of Sheepdog whose protocols differ. */
export type SheepVersion = '0.8' | '0.9' | '1.0';

export const HEADER_BYTES = 48;

export const Opcode = {
  CREATE_AND_WRITE_OBJ: 0x01,
  READ_OBJ: 0x02,
  WRITE_OBJ: 0x03,
  REMOVE_OBJ: 0x04,
  NEW_VDI: 0x11,
  LOCK_VDI: 0x12,
  RELEASE_VDI: 0x13,
  GET_VDI_INFO: 0x14,
  READ_VDIS: 0x15,
  DEL_VDI: 0x17,
  GET_CLUSTER_DEFAULT: 0x18,
  GET_NODE_LIST: 0x82,
  STAT_SHEEP: 0x86,
  STAT_CLUSTER: 0x87,
  STAT_RECOVERY: 0x97,
  READ_PEER: 0xa4,
  GET_VDI_COPIES: 0xab,
  EXIST: 0xbd,
  CLUSTER_INFO: 0xbe,
  READ_DEL_VDIS: 0xc9,
} as const;

/** Requests on an object. Of the headers of their answers only the common fields and the result matter. */
export const OBJECT_OPCODES: ReadonlySet<number> = new Set([
  Opcode.CREATE_AND_WRITE_OBJ,
  Opcode.READ_OBJ,
  Opcode.WRITE_OBJ,
  Opcode.REMOVE_OBJ,
]);

/** RECOVERY: a request between nodes that does not wait for the recovery of an object. */
export const Flag = { WRITE: 0x01, COW: 0x02, RECOVERY: 0x80 } as const;

export const Result = {
  SUCCESS: 0x00,
  UNKNOWN: 0x01,
  NO_OBJ: 0x02,
  EIO: 0x03,
  VDI_EXIST: 0x04,
  INVALID_PARMS: 0x05,
  SYSTEM_ERROR: 0x06,
  VDI_LOCKED: 0x07,
  NO_VDI: 0x08,
  NO_TAG: 0x0e,
  STARTUP: 0x0f,
  VDI_NOT_LOCKED: 0x10,
  SHUTDOWN: 0x11,
  FULL_VDI: 0x13,
  VER_MISMATCH: 0x14,
  NO_SPACE: 0x15,
  WAIT_FOR_FORMAT: 0x16,
  WAIT_FOR_JOIN: 0x17,
  HALT: 0x19,
  READONLY: 0x1a,
  /** COLLECTING_CINFO before 1.0. */
  OLD_COLLECTING_CINFO: 0x1c,
  OLD_NODE_VER: 0x81,
  NEW_NODE_VER: 0x82,
  NETWORK_ERROR: 0x86,
  BUFFER_SMALL: 0x88,
  NODE_IN_RECOVERY: 0x8c,
  KILLED: 0x8d,
  AGAIN: 0x8f,
  COLLECTING_CINFO: 0x95,
} as const;

const RESULT_NAMES = new Map<number, string>(Object.entries(Result).map(([name, value]) => [value, name]));

/** Meanings of results whose names do not tell an operator what to do. */
const RESULT_MEANINGS = new Map<number, string>([
  [
    Result.HALT,
    "it is strict ('dog cluster format -t'), and has fewer zones with nodes than copies or strips are wanted",
  ],
]);

/** "NO_SPACE (0x15)", with its meaning where the name does not tell it: a result in messages. */
export function resultName(result: number): string {
  const name = `${RESULT_NAMES.get(result) ?? 'result'} (0x${result.toString(16).padStart(2, '0')})`;
  const meaning = RESULT_MEANINGS.get(result);
  return meaning === undefined ? name : `${name}: ${meaning}`;
}

/** Flags of struct cluster_info. */
export const ClusterFlag = { STRICT: 0x01, DISK_MODE: 0x02, USE_LOCK: 0x08, RECYCLE_VID: 0x10 } as const;

/** enum sd_status: running; waiting for nodes or for `dog cluster format`. */
export const STATUS_RUNNING = 1;
export const STATUS_WAITING = 2;
export const STATUS_SHUTTING_DOWN = 3;

export const LOCK_TYPE_NORMAL = 0;
export const LOCK_TYPE_SHARED = 1;

/** SD_MAX_VDI_LEN and SD_MAX_VDI_TAG_LEN, with the terminating NUL. */
export const NAME_BYTES = 256;
export const TAG_BYTES = 256;
/** SD_NR_VDIS bits: the answer to READ_VDIS and READ_DEL_VDIS. */
export const VDI_BITMAP_BYTES = 2 ** 24 / 8;
/** SD_DEFAULT_BLOCK_SIZE_SHIFT, and the sizes of objects that nodes allow. */
export const DEFAULT_BLOCK_SIZE_SHIFT = 22;
export const MIN_BLOCK_SIZE_SHIFT = 20;
export const MAX_BLOCK_SIZE_SHIFT = 31;
/** MAX_DATA_OBJS: entries of a table. */
export const MAX_DATA_OBJECTS = 2 ** 20;

/**
 * Our limit for hyper volumes, because each object takes four bytes of memory: 256 TiB in objects of 4 MiB. Other VDIs have
 * MAX_DATA_OBJECTS at most.
 */
export const MAX_HYPER_OBJECTS = 2 ** 26;

/** struct sd_node without HAVE_DISKVNODES, and most nodes of a list. With HAVE_DISKVNODES a list needs no more room. */
export const NODE_BYTES = 80;
export const MAX_NODES = 6144;
/** Room for struct cluster_info. Nodes write all of it, however little room the request gives: never ask with less. */
export const CLUSTER_INFO_ROOM = 512 * 1024;
