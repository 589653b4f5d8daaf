/**
 * The observer of a server as the server calls it: no callback of the program throws into it, or leaves a rejected promise. It
 * owns what becomes of the observer's own errors, and of errors that nobody observes.
 */

import { ErrorWarnings } from './error-warnings.js';
import type {
  ConnectionCloseEvent,
  ConnectionOpenEvent,
  ConnectionRefusedEvent,
  ErrorContext,
  RequestDoneEvent,
  RequestEvent,
  ServerObserver,
} from './observer.js';
import { promiseOf } from '../promised.js';
import { checkObject } from '../kinds.js';

export class GuardedObserver implements ServerObserver {
  /** Not there if nobody listens: then no event is made. */
  readonly onRequest?: (event: RequestEvent) => void;
  readonly onRequestDone?: (event: RequestDoneEvent) => void;

  readonly #observer: ServerObserver;
  readonly #warnings = new ErrorWarnings();

  private constructor(observer: ServerObserver) {
    this.#observer = observer;
    if (typeof observer.onRequest === 'function') this.onRequest = (event) => this.#call('onRequest', event);
    if (typeof observer.onRequestDone === 'function') {
      this.onRequestDone = (event) => this.#call('onRequestDone', event);
    }
  }

  /** `observer`, guarded once. Errors: TypeError. */
  static of(observer: ServerObserver = {}): GuardedObserver {
    checkObject(observer, 'observer');
    return observer instanceof GuardedObserver ? observer : new GuardedObserver(observer);
  }

  onConnectionOpen(event: ConnectionOpenEvent): void {
    this.#call('onConnectionOpen', event);
  }

  onConnectionClose(event: ConnectionCloseEvent): void {
    this.#call('onConnectionClose', event);
  }

  onConnectionRefused(event: ConnectionRefusedEvent): void {
    this.#call('onConnectionRefused', event);
  }

  onListenerError(error: Error): void {
    this.#call('onListenerError', error);
  }

  onError(error: unknown, context: ErrorContext): void {
    if (!this.#call('onError', error, context)) this.#warnings.report(error, context);
  }

  /** False if the observer has no such callback, or it threw. */
  #call(name: keyof ServerObserver, ...details: readonly unknown[]): boolean {
    try {
      const observer: Readonly<Record<string, unknown>> = this.#observer as object as Record<string, unknown>;
      const callback = observer[name];
      if (typeof callback !== 'function') return false;
      const answer: unknown = callback.apply(observer, details);
      if (answer !== undefined) promiseOf(answer)?.then(undefined, (error: unknown) => this.#failed(name, error));
      return true;
    } catch (error) {
      this.#failed(name, error);
      return false;
    }
  }

  /** Not to onError: it may be what failed. */
  #failed(method: string, error: unknown): void {
    this.#warnings.report(error, { source: 'observer', method, expected: false });
  }
}
