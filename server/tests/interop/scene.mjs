// What every interop test stands in: one region or several on new databases, the clients it makes and the links
// they use, all cleared away at the end.
//
// `ISOBAR_TEST_REGIONS` says how many regions there are, linked to each other. With more than one, each client that
// a test makes connects to the next region in turn, so that a test's two sides meet across the regions' link.

import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { Client, converged } from "./client.mjs";
import { kinds } from "./database.mjs";
import { Link } from "./link.mjs";
import { Mesh } from "./mesh.mjs";

const TEST_WITHIN_MS = 60_000;
const REGIONS_MAX = 3;

const regionsWanted = Number(process.env.ISOBAR_TEST_REGIONS ?? 1);
assert.ok(regionsWanted >= 1 && regionsWanted <= REGIONS_MAX, "ISOBAR_TEST_REGIONS is 1, 2 or 3");

/**
 * Declares the test once for each database, in as many regions as are wanted. `body` gets the scene and node's test
 * context. `alone` says why a test makes sense in one region only.
 */
export function onEachDatabase(name, body, { alone } = {}) {
  const skip = regionsWanted > 1 && alone ? `one region only: ${alone}` : undefined;
  declare(name, body, regionsWanted, skip);
}

/** As [`onEachDatabase`], always in this many regions. */
export function acrossRegions(count, name, body) {
  declare(name, body, count);
}

function declare(name, body, regions, skip) {
  for (const [kind, { create, missing }] of Object.entries(kinds)) {
    const title = regions === 1 ? `${name} [${kind}]` : `${name} [${regions} regions, ${kind}]`;
    test(title, { skip: missing ?? skip ?? false, timeout: TEST_WITHIN_MS }, async t => {
      const scene = await Scene.open(await Promise.all(Array.from({ length: regions }, create)));
      try {
        await body(scene, t);
        scene.mesh.assertHealthy();
      } catch (error) {
        console.error(`the last lines of the server:\n${scene.mesh.log}`);
        throw error;
      } finally {
        await scene.close();
      }
    });
  }
}

class Scene {
  #clients = new Set();
  #placed = 0;
  #links = [];
  #folders = [];

  static async open(databases) {
    const scene = new Scene();
    scene.databases = databases;
    scene.mesh = await Mesh.start(databases);
    return scene;
  }

  get regions() {
    return this.mesh.regions;
  }

  /** The first region, or the only one. */
  get region() {
    return this.regions[0];
  }

  /** A new client of the next region in turn, or of `region`; `link` puts a cable before it that can be cut. */
  client({ link, region, ...options } = {}) {
    region ??= link?.region ?? this.regions[this.#placed++ % this.regions.length];
    const client = new Client(link?.url ?? region.url, options);
    client.region = region;
    this.#clients.add(client);
    return client;
  }

  /** Closes a client before the end of the test. */
  async leave(client) {
    this.#clients.delete(client);
    await client.close();
  }

  /** A cable to a region for clients; with several regions that is the last, if no other is named. */
  async link(region = this.regions.at(-1)) {
    const link = await new Link(() => region.port).heal();
    link.region = region;
    this.#links.push(link);
    return link;
  }

  /**
   * Asserts that `handle`, which was just found, shows what `author` does. In another region that may take a moment:
   * the document is found at once, its last changes may still be under way.
   */
  async caughtUp(handle, author) {
    if (this.regions.length > 1) await converged(handle, author);
    assert.deepEqual(handle.heads(), author.heads());
    assert.deepEqual(handle.doc(), author.doc());
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
      await this.mesh.stop();
    } finally {
      for (const database of this.databases) await database.remove();
      for (const folder of this.#folders) await rm(folder, { recursive: true, force: true });
    }
  }
}
