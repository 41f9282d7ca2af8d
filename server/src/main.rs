//! The command line.

use clap::{Parser, Subcommand};
use isobar::app::App;
use isobar::config::{ServeArgs, Settings};
use isobar::demo::{self, DemoArgs};
use isobar::telemetry::{self, LogFormat};

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
    Serve(Box<ServeArgs>),
    /// Run three regions in one process, with simulated distance between them and a control to cut it.
    ///
    /// Each has a database of its own in ./isobar-demo-data. What is running, where, and what to try is printed.
    Demo(DemoArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => serve(&args).await,
        Command::Demo(args) => {
            telemetry::start_logging(&args.log, LogFormat::Text)?;
            demo::run(&args, isobar::app::stop_signal()).await
        }
    }
}

async fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let settings = Settings::load(args)?;
    telemetry::start_logging(&settings.log, settings.log_format)?;
    let app = App::start(settings).await?;
    println!("clients: ws://{}", app.client_address);
    println!("admin: http://{}", app.admin_address);
    if let Some(address) = app.peer_address {
        let scheme = if app.node.settings.peer_tls_cert.is_some() { "wss" } else { "ws" };
        println!("peers: {scheme}://{address}");
    }
    app.run_until(isobar::app::stop_signal()).await
}
