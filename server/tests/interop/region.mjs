// One region under test: a real `isobar serve` process, its output, its death and its return.
//
// The program is `ISOBAR_BINARY`, or the debug build of this workspace. The process is never shared between
// tests, so a test may stop or kill it at will.

import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
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

// What regions that are linked share.
const CLUSTER_KEY = randomBytes(32).toString("hex");

export class Region {
  #database;
  #peers;
  #process;
  #log = [];
  #port = 0;
  #adminPort = 0;
  #peerPort = 0;

  /** `peers` are the addresses of other regions; without any the region stands alone. */
  constructor(database, { name = "interop", peers = [] } = {}) {
    this.#database = database;
    this.#peers = peers;
    this.name = name;
  }

  #command() {
    const linked = [
      ...["--peer-listen", `127.0.0.1:${this.#peerPort}`],
      ...this.#peers.flatMap(peer => ["--peer", peer]),
    ];
    return [
      "serve",
      ...["--listen", `127.0.0.1:${this.#port}`],
      ...["--admin-listen", `127.0.0.1:${this.#adminPort}`],
      ...["--database", this.#database],
      ...["--region", this.name],
      ...["--log", process.env.ISOBAR_TEST_LOG ?? "info"],
      ...(this.#peers.length > 0 ? linked : []),
    ];
  }

  /** The address for clients; the same after every restart. */
  get url() {
    return `ws://127.0.0.1:${this.#port}`;
  }

  get port() {
    return this.#port;
  }

  /** Where other regions reach this one. */
  get peerPort() {
    return this.#peerPort;
  }

  get running() {
    return this.#process !== undefined;
  }

  /** What the server logged last, for a failing test's message. */
  get log() {
    return this.#log.join("\n");
  }

  /** Asks the operators' interface; returns the response, whatever its status. */
  admin(path, options = {}) {
    return fetch(`http://127.0.0.1:${this.#adminPort}${path}`, options);
  }

  /** The names of the regions that are linked at this moment. */
  async peers() {
    const metrics = await (await this.admin("/metrics")).text();
    return [...metrics.matchAll(/^isobar_link_up\{region="([^"]+)"\} 1$/gm)].map(([, name]) => name);
  }

  /** Starts the server, on free ports at first and on those same ports ever after. */
  async start() {
    const child = spawn(binary, this.#command(), {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, ISOBAR_CLUSTER_KEY: CLUSTER_KEY },
    });
    this.#process = child;
    running.add(child);
    child.once("exit", () => running.delete(child));
    createInterface({ input: child.stderr }).on("line", line => this.#remember(line));
    const ports = await this.#listeningPorts(child);
    [this.#port, this.#adminPort, this.#peerPort] = [ports.clients, ports.admin, ports.peers ?? 0];
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

  /** The ports of the listeners, as the server announces them. */
  #listeningPorts(child) {
    const expected = this.#peers.length > 0 ? 3 : 2;
    const announced = new Promise((resolve, reject) => {
      const ports = {};
      createInterface({ input: child.stdout }).on("line", line => {
        const listener = /^(clients|peers|admin): \w+:\/\/127\.0\.0\.1:(\d+)/.exec(line);
        if (listener) ports[listener[1]] = Number(listener[2]);
        if (Object.keys(ports).length === expected) resolve(ports);
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
