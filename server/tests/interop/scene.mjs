// What every interop test stands in: one region on one new database, the clients it makes and the links they
// use, all cleared away at the end.

import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { Client } from "./client.mjs";
import { kinds } from "./database.mjs";
import { Link } from "./link.mjs";
import { Region } from "./region.mjs";

const TEST_WITHIN_MS = 60_000;

/** Declares the test once for each database. `body` gets the scene and node's test context. */
export function onEachDatabase(name, body) {
  for (const [kind, { create, missing }] of Object.entries(kinds)) {
    test(`${name} [${kind}]`, { skip: missing ?? false, timeout: TEST_WITHIN_MS }, async t => {
      const scene = await Scene.open(await create());
      try {
        await body(scene, t);
        scene.region.assertHealthy();
      } catch (error) {
        console.error(`the server's last lines:\n${scene.region.log}`);
        throw error;
      } finally {
        await scene.close();
      }
    });
  }
}

class Scene {
  #database;
  #clients = new Set();
  #links = [];
  #folders = [];

  static async open(database) {
    const scene = new Scene();
    scene.#database = database;
    scene.region = await new Region(database.url).start();
    return scene;
  }

  /** A new client; `link` puts a cable between it and the region that can be cut. */
  client({ link, ...options } = {}) {
    const client = new Client(link?.url ?? this.region.url, options);
    this.#clients.add(client);
    return client;
  }

  /** Closes a client before the end of the test. */
  async leave(client) {
    this.#clients.delete(client);
    await client.close();
  }

  async link() {
    const link = await new Link(() => this.region.port).heal();
    this.#links.push(link);
    return link;
  }

  /** A new folder for a client's storage. */
  async folder() {
    const folder = await mkdtemp(join(tmpdir(), "isobar-client-"));
    this.#folders.push(folder);
    return folder;
  }

  async close() {
    for (const client of this.#clients) await client.close();
    for (const link of this.#links) await link.cut();
    try {
      if (this.region.running) await this.region.stop();
    } finally {
      await this.#database.remove();
      for (const folder of this.#folders) await rm(folder, { recursive: true, force: true });
    }
  }
}
