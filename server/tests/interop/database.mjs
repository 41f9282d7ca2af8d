// A new, empty database for each test: a SQLite file, or a database on the Postgres server whose address is
// in `ISOBAR_TEST_DATABASE_URL`.

import { execFile } from "node:child_process";
import { randomUUID } from "node:crypto";
import { mkdtemp, rm } from "node:fs/promises";
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
  return {
    url: `sqlite:${join(folder, "region.db")}`,
    remove: () => rm(folder, { recursive: true, force: true }),
  };
}

async function createPostgres() {
  const name = `interop_${randomUUID().replaceAll("-", "")}`;
  await sql(`create database ${name}`);
  const url = new URL(postgres);
  url.pathname = `/${name}`;
  return { url: url.href, remove: () => sql(`drop database if exists ${name} with (force)`) };
}

function sql(statement) {
  return run("psql", ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", `--dbname=${postgres}`, `--command=${statement}`]);
}
