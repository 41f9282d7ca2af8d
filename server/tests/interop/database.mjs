// A new, empty database for each test: a SQLite file, or a database on the Postgres server whose address is
// in `ISOBAR_TEST_DATABASE_URL`. While no server uses it, it can be copied, and put back to what it was.

import { execFile } from "node:child_process";
import { randomUUID } from "node:crypto";
import { copyFile, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);
const postgres = process.env.ISOBAR_TEST_DATABASE_URL;

/** Each kind of database with the reason why it cannot be tested here, if there is one. */
export const kinds = {
  sqlite: { create: createSqlite, missing: undefined },
  postgres: {
    create: createPostgres,
    missing: postgres ? undefined : "ISOBAR_TEST_DATABASE_URL is not set",
  },
};

async function createSqlite() {
  const folder = await mkdtemp(join(tmpdir(), "isobar-interop-"));
  const file = join(folder, "region.db");
  return {
    url: `sqlite:${file}`,
    copy: () => copyFile(file, `${file}.copy`),
    restore: async () => {
      for (const journal of ["-wal", "-shm"]) await rm(file + journal, { force: true });
      await copyFile(`${file}.copy`, file);
    },
    remove: () => rm(folder, { recursive: true, force: true }),
  };
}

async function createPostgres() {
  const name = `interop_${randomUUID().replaceAll("-", "")}`;
  await sql(`create database ${name}`);
  const url = new URL(postgres);
  url.pathname = `/${name}`;
  const drop = name => sql(`drop database if exists ${name} with (force)`);
  return {
    url: url.href,
    copy: () => sql(`create database ${name}_copy template ${name}`),
    restore: async () => {
      await drop(name);
      await sql(`create database ${name} template ${name}_copy`);
    },
    remove: async () => {
      await drop(name);
      await drop(`${name}_copy`);
    },
  };
}

function sql(statement) {
  return run("psql", ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", `--dbname=${postgres}`, `--command=${statement}`]);
}
