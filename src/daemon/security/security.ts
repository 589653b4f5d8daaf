/**
 * The TLS material and the access rules in force: loaded from their files at the start, and again on reload or SIGHUP. A reload
 * replaces each of the two if its files are good, and keeps the old one if they are not. Never serves with less than was
 * configured.
 */
import type { ExportProvider, ServerTls } from 'nbd-server-ts';
import { AuthorisedExports, type Access, type SubjectExports } from '../../export/authorised-exports.js';
import { AccessRules, parseAccess } from './access-rules.js';
import type { ReloadReport } from '../../operations/control-protocol.js';
import { OperationError } from '../../operations/operations.js';
import { readSettings, SettingsError, textOf, warningOfWritable } from './settings-file.js';
import { loadTls, type LoadedTls, type TlsConfiguration } from './tls-files.js';

export interface SecurityConfiguration {
  readonly tls?: TlsConfiguration;
  /** Path of the access file; without one, every client that can connect may do everything. */
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
  /** The reload under way, or the last one: reloads run one after the other. */
  #reloading: Promise<unknown> = Promise.resolve();

  private constructor(configuration: SecurityConfiguration, log: SecurityLog) {
    this.#configuration = configuration;
    this.#log = log;
  }

  /** Load everything. Errors: TLS, ACCESS. */
  static async load(configuration: SecurityConfiguration, log: SecurityLog): Promise<Security> {
    const security = new Security(configuration, log);
    const warnings: string[] = [];
    security.#tls = await security.#loadTls(warnings);
    security.#rules = await security.#loadRules(warnings);
    for (const warning of warnings) log.warn({}, warning);
    return security;
  }

  /** For the NBD server; undefined if TLS is not configured. */
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

  /** `exports` under the access rules. */
  guard(exports: SubjectExports): ExportProvider {
    if (this.#configuration.access === undefined) return exports;
    return new AuthorisedExports(exports, {
      decide: (name, peer): Access => this.#rules?.decide(name, peer) ?? 'refused',
    });
  }

  /** Read all files again. Open connections stay as they are. A bad file is logged, and the old settings stay in force. Never fails. */
  reload(): Promise<ReloadReport> {
    const report = this.#reloading.then(() => this.#reload());
    this.#reloading = report.catch(() => undefined);
    return report;
  }

  async #reload(): Promise<ReloadReport> {
    const reloaded: string[] = [];
    const failures: string[] = [];
    const warnings: string[] = [];
    const attempt = async (what: string, load: () => Promise<boolean>): Promise<void> => {
      try {
        if (await load()) reloaded.push(what);
      } catch (error) {
        failures.push((error as Error).message);
        this.#log.error({ reason: (error as Error).message }, `${what} not reloaded, the old ones stay in force`);
      }
    };
    await attempt('TLS keys', async () => (this.#tls = await this.#loadTls(warnings)) !== undefined);
    await attempt('access rules', async () => (this.#rules = await this.#loadRules(warnings)) !== undefined);
    for (const warning of warnings) this.#log.warn({}, warning);
    const rules = this.#rules?.rules.length ?? null;
    if (failures.length === 0) this.#log.info({ ...(rules !== null && { rules }) }, 'reloaded');
    return { reloaded, rules, failures, warnings };
  }

  async #loadTls(warnings: string[]): Promise<LoadedTls | undefined> {
    const { tls } = this.#configuration;
    if (tls === undefined || tls.mode === 'off') return undefined;
    const loaded = await loadTls(tls);
    warnings.push(...loaded.warnings);
    return loaded;
  }

  async #loadRules(warnings: string[]): Promise<AccessRules | undefined> {
    const { access: file } = this.#configuration;
    if (file === undefined) return undefined;
    let text: string;
    try {
      const read = await readSettings(file);
      text = textOf(read);
      const warning = warningOfWritable(file, read);
      if (warning !== undefined) warnings.push(warning);
    } catch (error) {
      if (!(error instanceof SettingsError)) throw error;
      throw new OperationError('ACCESS', `the access file ${file} cannot be read: ${error.message}`, { cause: error });
    }
    const rules = parseAccess(text, file);
    this.#checkProvable(rules, file, warnings);
    if (rules.length === 0) warnings.push(`the access file ${file} has no rules: no client may open anything`);
    return new AccessRules(rules, { offersTls: this.#tls !== undefined });
  }

  /** Refuse rules that can never match. Errors: ACCESS. */
  #checkProvable(rules: AccessRules['rules'], file: string, warnings: string[]): void {
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
          warnings.push(`${file}:${line}: psk:${source.name} has no key in the --tls-psk file`);
        }
      }
    }
  }
}
