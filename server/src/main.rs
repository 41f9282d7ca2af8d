//! The command line.

use clap::{Parser, Subcommand};
use isobar::app::App;
use isobar::config::{ServeArgs, Settings};
use isobar::telemetry;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Isobar: a geo-distributed sync service for Automerge documents.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node: documents on its own database, any Automerge client on a WebSocket.
    ///
    /// With no settings at all it serves on loopback and keeps documents in ./isobar-data. Settings come from flags, from
    /// ISOBAR_* variables, from a TOML file and from defaults, in this order of precedence.
    Serve(ServeArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Command::Serve(args) = Cli::parse().command;
    let settings = Settings::load(&args)?;
    telemetry::start_logging(&settings.log, settings.log_format)?;
    let app = App::start(settings).await?;
    println!("clients: ws://{}", app.client_address);
    println!("admin: http://{}", app.admin_address);
    app.run_until(isobar::app::stop_signal()).await
}
