// One region under test: a real `isobar serve` process, its output, its death and its return.
//
// The program is `ISOBAR_BINARY`, or the debug build of this workspace. The process is never shared between
// tests, so a test may stop or kill it at will.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const START_WITHIN_MS = 20_000;
const STOP_WITHIN_MS = 20_000;
const LOG_LINES_KEPT = 60;

const binary =
  process.env.ISOBAR_BINARY ?? fileURLToPath(new URL("../../../target/debug/isobar", import.meta.url));

// When the test's process ends early, nothing it started stays behind.
const running = new Set();
process.once("exit", () => running.forEach(child => child.kill("SIGKILL")));

function command(database, port) {
  return [
    binary,
    "serve",
    ...["--listen", `127.0.0.1:${port}`],
    ...["--admin-listen", "127.0.0.1:0"],
    ...["--database", database],
    ...["--region", "interop"],
  ];
}

export class Region {
  #database;
  #process;
  #log = [];
  #port = 0;

  constructor(database) {
    this.#database = database;
  }

  /** The address for clients; the same after every restart. */
  get url() {
    return `ws://127.0.0.1:${this.#port}`;
  }

  get port() {
    return this.#port;
  }

  get running() {
    return this.#process !== undefined;
  }

  /** What the server logged last, for a failing test's message. */
  get log() {
    return this.#log.join("\n");
  }

  /** Starts the server, on a free port at first and on that same port ever after. */
  async start() {
    const [program, ...args] = command(this.#database, this.#port);
    const child = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"] });
    this.#process = child;
    running.add(child);
    child.once("exit", () => running.delete(child));
    createInterface({ input: child.stderr }).on("line", line => this.#remember(line));
    this.#port = await this.#listeningPort(child);
    return this;
  }

  /** Asks the server to finish and waits until it has; anything but a clean exit is an error. */
  async stop() {
    const { code, signal } = await this.#end("SIGTERM");
    if (code !== 0) throw new Error(`isobar ended with ${code ?? signal} when asked to stop:\n${this.log}`);
  }

  /** Ends the server without warning, as a crash or a power cut of the process would. */
  async kill() {
    await this.#end("SIGKILL");
  }

  /** Throws if the server ended by itself or panicked anywhere. */
  assertHealthy() {
    if (/panicked at/.test(this.log)) throw new Error(`isobar panicked:\n${this.log}`);
    if (this.#process && this.#process.exitCode !== null)
      throw new Error(`isobar ended by itself with ${this.#process.exitCode}:\n${this.log}`);
  }

  async #end(signal) {
    const child = this.#process;
    this.#process = undefined;
    if (child.exitCode !== null) throw new Error(`isobar had already ended with ${child.exitCode}:\n${this.log}`);
    const exit = once(child, "exit");
    child.kill(signal);
    const [code, by] = await Promise.race([exit, failAfter(STOP_WITHIN_MS, () => this.#overdue(child, signal))]);
    return { code, signal: by };
  }

  #overdue(child, signal) {
    child.kill("SIGKILL");
    return `isobar did not end within ${STOP_WITHIN_MS} ms of ${signal}:\n${this.log}`;
  }

  #remember(line) {
    this.#log.push(line);
    // A panic stays in view whatever is logged after it.
    if (this.#log.length > LOG_LINES_KEPT && !/panicked at/.test(this.#log[0])) this.#log.shift();
  }

  #listeningPort(child) {
    const announced = new Promise((resolve, reject) => {
      createInterface({ input: child.stdout }).on("line", line => {
        const listener = /^clients: ws:\/\/127\.0\.0\.1:(\d+)/.exec(line);
        if (listener) resolve(Number(listener[1]));
      });
      child.on("error", error => reject(new Error(`cannot start ${binary}: ${error.message}`)));
      child.on("exit", code => reject(new Error(`isobar ended with ${code} at its start:\n${this.log}`)));
    });
    return Promise.race([announced, failAfter(START_WITHIN_MS, () => `isobar announced no address:\n${this.log}`)]);
  }
}

function failAfter(ms, message) {
  return new Promise((_, reject) => setTimeout(() => reject(new Error(message())), ms).unref());
}
