/**
 * The event loop, shared fairly between the connections that it serves. A connection that has used its slice of a turn waits in
 * a queue; the connection that has used least time lately is served first, and between two turns of the queue the loop polls
 * the sockets. It owns the queue and the time that each connection has used; it contains nothing about requests.
 *
 * The clock is read once in a while, not for every small request: work is counted in units, so connections with little work
 * cost no clock.
 */

/** The time that one connection may use in a turn of the loop, milliseconds. */
const SLICE_MS = 2;
/** The time of a turn for input from all sockets, milliseconds; further input waits for the next turn. */
const TURN_MS = 4;
/** The time of a turn for waiting connections, milliseconds. */
const QUEUE_MS = 2;
/** Used time counts half after so long, milliseconds. */
const HALF_LIFE_MS = 100;
/** Units of work after which the clock is read. */
export const UNITS_PER_LOOK = 16;
/** More halvings than this leave nothing. */
const MAX_HALVINGS = 32;

/** The time that one connection has used of the loop. Times are of performance.now(). */
export class LoopUser {
  /** Milliseconds used; earlier ones count less. */
  used = 0;
  period = 0;
  /** The turn that `usedInTurn` is of. */
  turn = 0;
  usedInTurn = 0;
  /** When the part of its present work that is not charged yet began; 0 if the clock was not read during it. */
  since = 0;
}

/** Work that waits for its turn. */
export interface LoopTask {
  readonly loopUser: LoopUser;
  /** Do some of the work, calling `mustYield` and `finish`. If some is left it enqueues itself again. */
  serveTurn(): void;
}

export class LoopShare {
  /** Whether the sockets have used their time in this turn: new input has to wait as well. */
  isSpent = false;

  #unitsLeft = UNITS_PER_LOOK;
  #turn = 1;
  #turnBegan = 0;
  #isTurnOpen = false;
  readonly #waiting: LoopTask[] = [];

  /** Called before each piece of work of `units` units: whether `user` must wait for its turn first. */
  mustYield(user: LoopUser, units: number): boolean {
    this.#unitsLeft -= units;
    return this.#unitsLeft <= 0 && this.#look(user);
  }

  /** The work of `user` is done for now, or waits. */
  finish(user: LoopUser): void {
    if (user.since === 0) return;
    this.#charge(user, performance.now());
    user.since = 0;
  }

  /** `task` is served once when its turn comes. */
  enqueue(task: LoopTask): void {
    this.#waiting.push(task);
    if (!this.#isTurnOpen) this.#openTurn(performance.now());
  }

  /** `task` needs no turn any more. */
  leave(task: LoopTask): void {
    const index = this.#waiting.indexOf(task);
    if (index >= 0) this.#waiting.splice(index, 1);
  }

  #look(user: LoopUser): boolean {
    this.#unitsLeft = UNITS_PER_LOOK;
    const now = performance.now();
    if (!this.#isTurnOpen) this.#openTurn(now);
    if (user.turn !== this.#turn) {
      user.turn = this.#turn;
      user.usedInTurn = 0;
    }
    if (user.since !== 0) this.#charge(user, now);
    user.since = now;
    if (now - this.#turnBegan >= TURN_MS) this.isSpent = true;
    return this.isSpent || user.usedInTurn >= SLICE_MS;
  }

  #charge(user: LoopUser, now: number): void {
    const elapsed = now - user.since;
    const period = Math.floor(now / HALF_LIFE_MS);
    user.used = usedLately(user, period) + elapsed;
    user.period = period;
    user.usedInTurn += elapsed;
  }

  #openTurn(now: number): void {
    this.#isTurnOpen = true;
    this.#turn++;
    this.#turnBegan = now;
    setImmediate(this.#endTurn);
  }

  /** The loop has polled all sockets: waiting tasks are served, each at most once, before it polls again. */
  readonly #endTurn = (): void => {
    this.isSpent = false;
    if (this.#waiting.length === 0) {
      this.#isTurnOpen = false;
      return;
    }
    this.#turn++;
    const began = performance.now();
    let now = began;
    this.#turnBegan = began;
    for (let left = this.#waiting.length; left > 0; left--) {
      const task = this.#takeNext(now);
      if (task === undefined) break;
      task.serveTurn();
      now = performance.now();
      if (now - began >= QUEUE_MS) break;
    }
    this.isSpent = false;
    this.#turnBegan = now;
    setImmediate(this.#endTurn);
  };

  /** The task that has used least time lately; of several, the one that has waited longest. */
  #takeNext(now: number): LoopTask | undefined {
    const period = Math.floor(now / HALF_LIFE_MS);
    let best = 0;
    let least = Infinity;
    for (let i = 0; i < this.#waiting.length; i++) {
      const used = usedLately((this.#waiting[i] as LoopTask).loopUser, period);
      if (used < least) {
        least = used;
        best = i;
      }
    }
    return this.#waiting.splice(best, 1)[0];
  }
}

function usedLately(user: LoopUser, period: number): number {
  return user.used / 2 ** Math.min(period - user.period, MAX_HALVINGS);
}
