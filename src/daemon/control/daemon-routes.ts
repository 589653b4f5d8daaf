/** Routes of the control API for the daemon itself: its status, its settings, its NBD connections. */
import { first, connectionId, keepOutIn } from './request-fields.js';
import type { Route } from './route.js';

export const DAEMON_ROUTES: readonly Route[] = [
  { method: 'GET', path: ['status'], answer: ({ status }) => status() },
  { method: 'POST', path: ['reload'], answer: ({ reload }) => reload() },
  {
    method: 'GET',
    path: ['sessions', '*'],
    answer: async ({ sessionEnd, names }) => {
      await sessionEnd(first(names));
      return null;
    },
  },
  {
    method: 'POST',
    path: ['connections', '*', 'disconnect'],
    answer: ({ disconnect, names, body }) => disconnect(connectionId(first(names)), keepOutIn(body)),
  },
];
