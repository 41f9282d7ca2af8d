//! Runs a command beside a throw-away Postgres: `with-postgres COMMAND [ARGUMENT…]`.
//!
//! The command finds the server in `ISOBAR_TEST_DATABASE_URL`. Its exit code is passed on.

use std::process::{Command, ExitCode};

use isobar_testkit::{DATABASE_URL_VARIABLE, Durability, PostgresCluster};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        eprintln!("usage: with-postgres COMMAND [ARGUMENT…]");
        return ExitCode::from(2);
    };
    let outcome = PostgresCluster::start(Durability::None).and_then(|cluster| {
        let url = cluster.url("postgres");
        Command::new(program).args(arguments).env(DATABASE_URL_VARIABLE, url).status()
    });
    match outcome {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("with-postgres: {error}");
            ExitCode::FAILURE
        }
    }
}
