/**
 * What nodes keep in memory of every VDI, as GET_VDI_COPIES tells it: here, which ones are locked. Owns the offsets in
 * struct vdi_state (internal_proto.h); decides nothing.
 */

/** sizeof(struct vdi_state), with room for SD_MAX_COPIES participants of a shared lock. */
export const VDI_STATE_BYTES = 1428;
const VID_OFFSET = 0;
const LOCK_STATE_OFFSET = 16;
/** enum lock_state. The others are "locked" and, for iSCSI targets, "shared". */
const UNLOCKED = 1;

/** Of the states of an answer: the vids of those that are locked. */
export function lockedVidsIn(states: Buffer): number[] {
  const vids: number[] = [];
  for (let at = 0; at + VDI_STATE_BYTES <= states.length; at += VDI_STATE_BYTES) {
    if (states.readUInt32LE(at + LOCK_STATE_OFFSET) > UNLOCKED) vids.push(states.readUInt32LE(at + VID_OFFSET));
  }
  return vids;
}
