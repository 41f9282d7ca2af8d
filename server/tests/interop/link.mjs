// A cable between clients and the region that a test can cut and heal. While it is cut, connections are
// refused, as they are when a laptop has left its network.

import { once } from "node:events";
import { connect, createServer } from "node:net";

export class Link {
  #regionPort;
  #port = 0;
  #server;
  #sockets = new Set();

  /** `regionPort` is asked at each connection, since the region may have moved. */
  constructor(regionPort) {
    this.#regionPort = regionPort;
  }

  get url() {
    return `ws://127.0.0.1:${this.#port}`;
  }

  async heal() {
    this.#server = createServer(socket => this.#forward(socket));
    this.#server.listen(this.#port, "127.0.0.1");
    await once(this.#server, "listening");
    this.#port = this.#server.address().port;
    return this;
  }

  /** Cuts every connection at once; what is under way is lost. */
  async cut() {
    const server = this.#server;
    if (!server) return;
    this.#server = undefined;
    const closed = once(server, "close");
    server.close();
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }

  #forward(near) {
    const far = connect(this.#regionPort(), "127.0.0.1");
    for (const [socket, other] of [
      [near, far],
      [far, near],
    ]) {
      this.#sockets.add(socket);
      socket.on("error", () => {});
      socket.on("close", () => {
        this.#sockets.delete(socket);
        other.destroy();
      });
      socket.pipe(other);
    }
  }
}
