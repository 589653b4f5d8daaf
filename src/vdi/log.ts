/**
 * How this layer and the exports report events that no caller waits for to the operator. The daemon decides where a line goes.
 */
export type Log = (line: string, details?: object) => void;

/** The same for what clients can cause again and again: of one `subject` a line is logged only once in a while. */
export type LogOften = (subject: string, line: string, details: object) => void;
