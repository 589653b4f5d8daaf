/**
 * The export that a command fills a VDI through, while nobody else can open it: NAME/unfinished=RUN, RUN being what the
 * mark in the VDI's record says. Only connections through the control socket know that form. Owns it in both directions.
 */
import type { Peer } from 'nbd-server-ts';

const FORM = /^([^/]*)\/unfinished=([0-9a-f]{1,32})$/;

export function unfinishedExport(name: string, run: string): string {
  return `${name}/unfinished=${run}`;
}

/** Any other name is that of an export that is not unfinished. */
export function parseUnfinishedExport(
  exportName: string,
  peer: Peer,
): { readonly name: string; readonly run?: string } {
  const [, name, run] = (peer.transport === 'internal' && FORM.exec(exportName)) || [];
  return name === undefined || run === undefined ? { name: exportName } : { name, run };
}
