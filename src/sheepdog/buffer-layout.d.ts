/** The part of buffer-layout that the layouts here use; the package ships no types of its own. */
declare module 'buffer-layout' {
  export class Layout<T> {
    readonly span: number;
    readonly property: string;
    decode(buffer: Buffer, offset?: number): T;
    encode(value: T, buffer: Buffer, offset?: number): number;
  }
  export class Structure<T> extends Layout<T> {
    offsetOf(property: string): number | undefined;
  }
  export function u8(property: string): Layout<number>;
  export function u16(property: string): Layout<number>;
  export function u32(property: string): Layout<number>;
  export function s16(property: string): Layout<number>;
  export function nu64(property: string): Layout<number>;
  export function blob(length: number, property: string): Layout<Buffer>;
  export function struct<T>(fields: readonly Layout<unknown>[], property?: string): Structure<T>;
}
