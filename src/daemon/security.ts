/**
 * What decides who is served and how: TLS material and access rules, loaded from their files and loaded again on SIGHUP.
 * Owns the pair that is in force; a reload replaces each if its files are good, and leaves it if they are not.
 */
import fs from 'node:fs';
import type { ExportProvider, ServerTls } from 'nbd-server-ts';
import { AuthorisedExports, type Access, type SubjectExports } from '../export/authorised-exports.js';
import { AccessRules, parseAccess } from './access.js';
import { OperationError } from './operations.js';
import { loadTls, type LoadedTls, type TlsConfiguration } from './tls-files.js';

export interface SecurityConfiguration {
  readonly tls?: TlsConfiguration;
  /** The access file; without one, whoever can connect may do everything. */
  readonly access?: string;
}

export interface SecurityLog {
  warn(details: object, message: string): void;
  info(details: object, message: string): void;
  error(details: object, message: string): void;
}

export class Security {
  readonly #configuration: SecurityConfiguration;
  readonly #log: SecurityLog;
  #tls: LoadedTls | undefined;
  #rules: AccessRules | undefined;

  /** Load everything. Errors: TLS, ACCESS. */
  constructor(configuration: SecurityConfiguration, log: SecurityLog) {
    this.#configuration = configuration;
    this.#log = log;
    this.#tls = this.#loadTls();
    this.#rules = this.#loadRules();
  }

  /** For the NBD server; undefined if TLS was never mentioned. */
  get tls(): ServerTls | undefined {
    const mode = this.#configuration.tls?.mode;
    if (mode === undefined) return undefined;
    return {
      mode,
      material: () => {
        if (this.#tls === undefined) throw new Error('security: TLS is off');
        return this.#tls.material;
      },
    };
  }

  /** `exports` as the rules let them be seen. */
  guard(exports: SubjectExports): ExportProvider {
    if (this.#configuration.access === undefined) return exports;
    return new AuthorisedExports(exports, {
      decide: (name, peer): Access => this.#rules?.decide(name, peer) ?? 'refused',
    });
  }

  /**
   * Read all files again. Connections that are open stay as they are. Whether everything was good; what was not is
   * logged, and what was in force before stays so.
   */
  reload(): boolean {
    let isGood = true;
    const attempt = (what: string, load: () => void): void => {
      try {
        load();
      } catch (error) {
        if (!(error instanceof OperationError)) throw error;
        isGood = false;
        this.#log.error({ reason: error.message }, `${what} not reloaded, the old stay in force`);
      }
    };
    attempt('TLS keys', () => (this.#tls = this.#loadTls()));
    attempt('access rules', () => (this.#rules = this.#loadRules()));
    if (isGood) this.#log.info({ rules: this.#rules?.rules.length }, 'reloaded');
    return isGood;
  }

  #loadTls(): LoadedTls | undefined {
    const { tls } = this.#configuration;
    if (tls === undefined || tls.mode === 'off') return undefined;
    const loaded = loadTls(tls);
    for (const warning of loaded.warnings) this.#log.warn({}, warning);
    return loaded;
  }

  #loadRules(): AccessRules | undefined {
    const { access: file } = this.#configuration;
    if (file === undefined) return undefined;
    let text: string;
    try {
      text = fs.readFileSync(file, 'utf8');
    } catch (error) {
      throw new OperationError('ACCESS', `the access file ${file} cannot be read: ${(error as Error).message}`, {
        cause: error,
      });
    }
    const rules = parseAccess(text, file);
    this.#checkProvable(rules, file);
    if (rules.length === 0) this.#log.warn({ file }, 'the access file has no rules: nobody may open anything');
    return new AccessRules(rules, { offersTls: this.#tls !== undefined });
  }

  /** A rule that can never hold is a mistake. Errors: ACCESS. */
  #checkProvable(rules: AccessRules['rules'], file: string): void {
    for (const { line, sources } of rules) {
      for (const source of sources.flat()) {
        const bad = (what: string): OperationError => new OperationError('ACCESS', `${file}:${line}: ${what}`);
        if (source.kind === 'cert' && this.#tls?.material.verifyPeer !== true) {
          throw bad(`cert:${source.name} is never proven without --tls-verify-peer; add that option`);
        }
        if (source.kind !== 'psk') continue;
        if (this.#tls?.material.pskKey === undefined) {
          throw bad(`psk:${source.name} is never proven without --tls-psk FILE; add that option`);
        }
        if (!this.#tls.pskUsers.has(source.name)) {
          this.#log.warn({ file, line }, `psk:${source.name} has no key in the --tls-psk file`);
        }
      }
    }
  }
}
