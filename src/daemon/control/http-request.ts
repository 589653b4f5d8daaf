/**
 * Parses what comes in on the control socket as HTTP: path, query, and a body of JSON. Owns the bounds of it and the errors for
 * a request that is not well formed. Does not interpret fields (request-fields.ts), and answers nothing.
 */
import type http from 'node:http';
import { MAX_REQUEST_BODY_BYTES } from '../../operations/control-protocol.js';
import { badRequest, type Body } from './request-fields.js';

/** Errors: BAD_REQUEST. */
export function urlOf(request: http.IncomingMessage): URL {
  try {
    return new URL(request.url ?? '/', 'http://control');
  } catch {
    throw badRequest(`the path ${JSON.stringify(request.url)} is not valid`);
  }
}

/** The segments of a path, percent-decoded. Errors: BAD_REQUEST. */
export function decodeSegments(pathname: string): string[] {
  try {
    return pathname.split('/').slice(1).map(decodeURIComponent);
  } catch {
    throw badRequest(`the path ${pathname} is not well encoded`);
  }
}

/** The body's JSON object; {} without a body. Errors: BAD_REQUEST. */
export async function readBody(request: http.IncomingMessage): Promise<Body> {
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    for await (const chunk of request as AsyncIterable<Buffer>) {
      length += chunk.length;
      if (length > MAX_REQUEST_BODY_BYTES) break;
      chunks.push(chunk);
    }
  } catch (error) {
    // The client has left, and will not read the answer.
    throw badRequest(`the body ended early: ${(error as Error).message}`);
  }
  if (length > MAX_REQUEST_BODY_BYTES) throw badRequest(`the body is longer than ${MAX_REQUEST_BODY_BYTES} bytes`);
  if (length === 0) return {};
  let body: unknown;
  try {
    body = JSON.parse(Buffer.concat(chunks).toString());
  } catch (error) {
    throw badRequest(`the body is not JSON: ${(error as Error).message}`);
  }
  if (typeof body !== 'object' || body === null || Array.isArray(body))
    throw badRequest('the body must be a JSON object');
  return body as Body;
}
