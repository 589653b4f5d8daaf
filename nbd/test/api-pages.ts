/**
 * The API pages of the package, made from the exports of all its entries and their docstrings: a page for each class and
 * function, one for all interfaces and types, one for the constants, and the list of them by entry. It owns their layout.
 */

import fs from 'node:fs';
import { fileURLToPath } from 'node:url';
import prettier from 'prettier';
import ts from 'typescript';

const PACKAGE = fileURLToPath(new URL('../package.json', import.meta.url));
const SOURCES = fileURLToPath(new URL('../src/', import.meta.url));

export interface ApiPages {
  /** The pages, by file name in docs/api. */
  readonly pages: ReadonlyMap<string, string>;
  /** Exports and public members of classes without a docstring. */
  readonly unexplained: readonly string[];
  /** All exports, with the page of each. */
  readonly exports: ReadonlyMap<string, string>;
}

/** An entry of the package: what is imported, and the source that this leads to. */
interface Entry {
  readonly module: string;
  readonly source: string;
}

/** The entries that package.json exports; the one without a subpath first. */
function entries(): Entry[] {
  const { name, exports } = JSON.parse(fs.readFileSync(PACKAGE, 'utf8')) as { name: string; exports: object };
  return Object.entries(exports).flatMap(([subpath, target]) => {
    const built = /"\.\/dist\/(?!cjs\/)([^"]+)\.js"/.exec(JSON.stringify(target))?.[1];
    if (built === undefined) return [];
    return [{ module: name + subpath.slice(1), source: `${SOURCES}${built}.ts` }];
  });
}

export async function makeApiPages(): Promise<ApiPages> {
  const all = entries();
  const program = ts.createProgram(
    all.map(({ source }) => source),
    {
      ...{ target: ts.ScriptTarget.ES2023, module: ts.ModuleKind.NodeNext, strict: true },
      moduleResolution: ts.ModuleResolutionKind.NodeNext,
      // The pages are made from the text of declarations: the types of JavaScript and Node would only take time to read.
      ...{ noLib: true, types: [] },
    },
  );
  const checker = program.getTypeChecker();
  /** Each export once, with the first entry that has it. */
  const found = new Map<ts.Symbol, string>();
  for (const { module, source } of all) {
    const file = program.getSourceFile(source);
    const symbol = file && checker.getSymbolAtLocation(file);
    if (symbol === undefined) throw new Error(`${source} exports nothing`);
    for (const one of checker.getExportsOfModule(symbol)) {
      const real = (one.flags & ts.SymbolFlags.Alias) !== 0 ? checker.getAliasedSymbol(one) : one;
      if (!found.has(real)) found.set(real, module);
    }
  }
  const sorted = [...found].sort(([a], [b]) => (a.name < b.name ? -1 : 1));

  const maker = new PageMaker(checker);
  const texts = new Map<string, string[]>([
    ['types.md', ['# Interfaces and types', '']],
    ['constants.md', ['# Constants', '']],
  ]);
  const exports = new Map<string, string>();
  const byModule = new Map<string, string[]>(all.map(({ module }) => [module, []]));
  for (const [symbol, module] of sorted) {
    const [declaration] = symbol.declarations ?? [];
    if (declaration === undefined) throw new Error(`${symbol.name} is declared nowhere`);
    let page = 'types.md';
    if (ts.isClassDeclaration(declaration) || ts.isFunctionDeclaration(declaration)) {
      page = `${symbol.name}.md`;
      const isClass = ts.isClassDeclaration(declaration);
      const of = { symbol, module };
      texts.set(page, isClass ? maker.classPage(of, declaration) : maker.functionPage(of, declaration));
    } else if (ts.isVariableDeclaration(declaration)) {
      page = 'constants.md';
      texts.get(page)?.push(`## ${symbol.name}`, '', ...maker.codeOf(declaration.parent.parent), '');
    } else {
      texts.get(page)?.push(`## ${symbol.name}`, '', ...maker.codeOf(declaration), '');
    }
    if (page === 'types.md' || page === 'constants.md') maker.explain(symbol);
    if (exports.has(symbol.name)) throw new Error(`two exports are named ${symbol.name}`);
    exports.set(symbol.name, page);
    byModule.get(module)?.push(`- [${symbol.name}](${page}${anchor(symbol.name, page)})`);
  }
  texts.set('README.md', [
    '# The API of nbd-server-ts',
    '',
    'Made from the docstrings of the sources: `npx vitest run --project own nbd/test/api-pages.test.ts -u` makes it anew.',
    '',
    ...[...byModule].flatMap(([module, lines]) => (lines.length === 0 ? [] : [`## ${module}`, '', ...lines, ''])),
  ]);
  const pages = new Map<string, string>();
  for (const [page, lines] of texts) pages.set(page, await formatted(lines.join('\n')));
  return { pages, unexplained: maker.unexplained, exports };
}

function anchor(name: string, page: string): string {
  return page === `${name}.md` ? '' : `#${name.toLowerCase()}`;
}

async function formatted(markdown: string): Promise<string> {
  return prettier.format(markdown, { ...(await prettier.resolveConfig(PACKAGE)), parser: 'markdown' });
}

/** An export, and the entry to import it from. */
interface Exported {
  readonly symbol: ts.Symbol;
  readonly module: string;
}

class PageMaker {
  readonly unexplained: string[] = [];

  constructor(private readonly checker: ts.TypeChecker) {}

  classPage({ symbol, module }: Exported, declaration: ts.ClassDeclaration): string[] {
    const lines = [`# ${symbol.name}`, '', this.explain(symbol), '', ...importOf(symbol.name, module)];
    for (const member of declaration.members) {
      if (isHidden(member)) continue;
      const isMaker = ts.isConstructorDeclaration(member);
      const name = isMaker ? 'constructor' : member.name?.getText();
      if (name === undefined) continue;
      const title = ts.isMethodDeclaration(member) ? `${name}()` : isMaker ? `new ${symbol.name}()` : name;
      const documented = isMaker
        ? this.explanation(this.checker.getSignatureFromDeclaration(member))
        : this.explain(this.checker.getSymbolAtLocation(member.name ?? member), `${symbol.name}.`);
      lines.push(`## ${title}`, '', ...code(signatureOf(member)), '', documented, '');
    }
    return lines;
  }

  functionPage({ symbol, module }: Exported, declaration: ts.FunctionDeclaration): string[] {
    return [
      `# ${symbol.name}()`,
      '',
      this.explain(symbol),
      '',
      ...importOf(symbol.name, module),
      ...code(signatureOf(declaration)),
    ];
  }

  /** A declaration in source text, with its docstring. */
  codeOf(declaration: ts.Node): string[] {
    const comments = ts.getJSDocCommentsAndTags(declaration).filter((comment) => ts.isJSDoc(comment));
    const start = comments[0]?.getStart() ?? declaration.getStart();
    return code(
      declaration
        .getSourceFile()
        .text.slice(start, declaration.getEnd())
        .replace(/^export /m, ''),
    );
  }

  /** The docstring of a symbol; a missing one is recorded. */
  explain(symbol: ts.Symbol | undefined, prefix = ''): string {
    const text = this.explanation(symbol);
    if (text === '') this.unexplained.push(prefix + (symbol?.name ?? '?'));
    return text;
  }

  private explanation(of: ts.Symbol | ts.Signature | undefined): string {
    if (of === undefined) return '';
    const text = ts.displayPartsToString(of.getDocumentationComment(this.checker));
    const tags = ('declaration' in of ? of.getJsDocTags() : (of as ts.Symbol).getJsDocTags(this.checker)).map(
      ({ name, text: words }) => `- ${name === 'param' ? '' : `${name}: `}${ts.displayPartsToString(words)}`,
    );
    return [text, ...(tags.length > 0 ? ['', ...tags] : [])].join('\n');
  }
}

function isHidden(member: ts.ClassElement): boolean {
  const flags = ts.getCombinedModifierFlags(member);
  return (flags & ts.ModifierFlags.Private) !== 0 || (member.name !== undefined && ts.isPrivateIdentifier(member.name));
}

/** A member without its body. */
function signatureOf(member: ts.Node): string {
  const text = member.getText();
  const body = (member as { body?: ts.Node }).body;
  const start = member.getStart();
  if (body !== undefined) return text.slice(0, body.getStart() - start).trim();
  const initializer = (member as { initializer?: ts.Node }).initializer;
  if (initializer === undefined) return text;
  return text.slice(0, initializer.getStart() - start).replace(/\s*=\s*$/, '');
}

const code = (text: string): string[] => ['```ts', text, '```'];
const importOf = (name: string, module: string): string[] => [...code(`import { ${name} } from '${module}';`), ''];
