// A cable that a test can cut and heal: between clients and a region, or between two regions. While it is cut,
// connections are refused, as they are when a laptop has left its network. While it hangs, connections stay and
// bytes do not arrive, as when a route between two regions is lost.

import { once } from "node:events";
import { connect, createServer } from "node:net";

export class Link {
  #farPort;
  #port = 0;
  #server;
  #hanging = false;
  #sockets = new Map();

  /** `farPort` is asked at each connection, since the region may have moved. */
  constructor(farPort) {
    this.#farPort = farPort;
  }

  get url() {
    return `ws://127.0.0.1:${this.#port}`;
  }

  /** Undoes whatever was done to it. What waited while it hung arrives. */
  async heal() {
    if (this.#hanging) {
      this.#hanging = false;
      for (const [socket, other] of this.#sockets) socket.pipe(other);
    }
    if (this.#server) return this;
    this.#server = createServer(socket => this.#forward(socket));
    this.#server.listen(this.#port, "127.0.0.1");
    await once(this.#server, "listening");
    this.#port = this.#server.address().port;
    return this;
  }

  /** Lets nothing through from now on, and breaks no connection. */
  hang() {
    this.#hanging = true;
    for (const [socket, other] of this.#sockets) socket.unpipe(other).pause();
  }

  /** Cuts every connection at once; what is under way is lost. */
  async cut() {
    const server = this.#server;
    if (!server) return;
    this.#server = undefined;
    const closed = once(server, "close");
    server.close();
    for (const socket of this.#sockets.keys()) socket.destroy();
    await closed;
  }

  #forward(near) {
    const far = connect(this.#farPort(), "127.0.0.1");
    for (const [socket, other] of [
      [near, far],
      [far, near],
    ]) {
      this.#sockets.set(socket, other);
      socket.on("error", () => {});
      socket.on("close", () => {
        this.#sockets.delete(socket);
        other.destroy();
      });
      if (!this.#hanging) socket.pipe(other);
    }
  }
}
