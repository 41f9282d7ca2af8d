// Regions that are linked to each other: each a process with a database of its own, each dialling every other
// through a cable that a test can let hang, cut and heal.

import { Link } from "./link.mjs";
import { Region } from "./region.mjs";
import { until } from "./until.mjs";

const NAMES = ["here", "there", "elsewhere"];

export class Mesh {
  #cables = [];
  regions = [];

  /** Starts one region on each database. With more than one, all are linked when this returns. */
  static async start(databases) {
    const mesh = new Mesh();
    const { regions } = mesh;
    if (databases.length === 1) {
      regions.push(await new Region(databases[0].url).start());
      return mesh;
    }
    for (const [index, database] of databases.entries()) {
      const cables = await mesh.#cablesFrom(index, databases.length);
      regions.push(new Region(database.url, { name: NAMES[index], peers: cables.map(cable => cable.url) }));
    }
    await Promise.all(regions.map(region => region.start()));
    await mesh.linked();
    return mesh;
  }

  async #cablesFrom(from, count) {
    const targets = [...Array(count).keys()].filter(to => to !== from);
    const cables = await Promise.all(targets.map(to => new Link(() => this.regions[to].peerPort).heal()));
    cables.forEach((link, index) => this.#cables.push({ ends: [from, targets[index]], link }));
    return cables;
  }

  /** The cables between two regions, whichever of them dials, as one; without arguments those between any. */
  between(...regions) {
    const wanted = regions.map(region => this.regions.indexOf(region));
    const cables = this.#cables.filter(({ ends }) => wanted.every(end => ends.includes(end)));
    const links = cables.map(({ link }) => link);
    return {
      hang: () => links.forEach(link => link.hang()),
      cut: () => Promise.all(links.map(link => link.cut())),
      heal: () => Promise.all(links.map(link => link.heal())),
    };
  }

  /** Waits until each region that runs has a link to each other that runs, or to those it is asked about. */
  async linked(...regions) {
    const wanted = regions.length > 0 ? regions : this.regions.filter(region => region.running);
    await until(async () => {
      const peers = await Promise.all(wanted.map(region => region.peers()));
      return wanted.every((region, index) =>
        wanted.every(other => other === region || peers[index].includes(other.name)),
      );
    }, "the regions to be linked");
  }

  async stop() {
    const running = this.regions.filter(region => region.running);
    const stopped = await Promise.allSettled(running.map(region => region.stop()));
    await this.between().cut();
    for (const { reason } of stopped) if (reason) throw reason;
  }

  assertHealthy() {
    for (const region of this.regions) region.assertHealthy();
  }

  /** What every region logged last. */
  get log() {
    return this.regions.map(region => `${region.name}:\n${region.log}`).join("\n");
  }
}
