/**
 * Answers of the program that come later: promises, and anything else with a method `then`. It owns the rule what counts as
 * one. What it returns settles once, whatever the program's object does.
 */

/** What `await` and every promise of the language use. A promise with another one may do anything in it. */
// eslint-disable-next-line @typescript-eslint/unbound-method -- only compared
const PLAIN_THEN = Promise.prototype.then;

/**
 * `answer` as a promise if it comes later; undefined if `answer` is the answer. A promise of the language is returned as it
 * is: its `then` is the quickest way to wait. Errors: what a getter or a proxy of the program throws.
 */
export function promiseOf(answer: unknown): Promise<unknown> | undefined {
  if (answer instanceof Promise && answer.then === PLAIN_THEN) return answer;
  if ((typeof answer !== 'object' && typeof answer !== 'function') || answer === null) return undefined;
  const { then } = answer as { readonly then?: unknown };
  if (typeof then !== 'function') return undefined;
  return new Promise((resolve, reject) => {
    // The same object, and read once: `then` may be a getter.
    then.call(answer, resolve, reject);
  });
}

/**
 * `answer`, to be awaited: `await` itself ignores the `then` of a promise that has one of its own. Errors: see promiseOf.
 */
export function awaited<T>(answer: T | Promise<T>): T | Promise<T> {
  return (promiseOf(answer) as Promise<T> | undefined) ?? answer;
}
