//! A client that knows nothing fetches the 260,000-edit document.
//!
//! The document is uploaded once, as a stock client does it: one sync message with the whole document. Then clients
//! join one after the other, each with a new connection. The server is started again on its storage, and one more
//! client joins. From the bare server the same bytes are fetched as a file over HTTP and as one WebSocket message.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use automerge::{AutoCommit, ROOT, ReadDoc};
use futures_util::StreamExt;
use yrs::updates::decoder::Decode;
use yrs::{GetString, Transact, Update};

use crate::client::{Client, upload};
use crate::results::{Sample, median};
use crate::servers::{Environment, Kind, Server, http_get_bytes};
use crate::session::{Dialect, Session};
use crate::workload::{Chain, Document};

/// How long one join may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Load {
    pub chain: Arc<Chain>,
    pub joins: u32,
    /// Size of the Automerge document, for the bare server's answers.
    pub bytes: usize,
}

pub async fn run(environment: &Environment, kind: Kind, load: &Load) -> Result<Sample> {
    if kind.is_bare() {
        return run_bare(environment, kind, load).await;
    }
    let mut server = Server::start(environment, kind).await?;
    let document = Document::numbered(1, &load.chain);
    server.create(&document).await?;
    let uploading = Instant::now();
    let uploader = upload(&server.address(&document), kind.dialect(), &document, "uploader").await?;
    let mut sample = Sample::default();
    sample.set("upload_ms", uploading.elapsed().as_secs_f64() * 1e3);
    uploader.close().await;
    // Long enough for a server that tidies up in the background to have begun.
    server.settle(Duration::from_secs(2), Duration::from_secs(60)).await;

    let mut walls = Vec::new();
    let (mut bytes, mut kept) = (0, Session::new(kind.dialect(), String::new(), document.clone(), 0));
    let before = server.cpu() + server.database_cpu();
    for number in 0..load.joins {
        let joined = join(&server, kind, &document, &format!("bench-joiner-{number}")).await?;
        walls.push(joined.wall.as_secs_f64() * 1e3);
        (bytes, kept) = (joined.bytes, joined.session);
    }
    server.settle(Duration::from_millis(300), Duration::from_secs(10)).await;
    let used = (server.cpu() + server.database_cpu()).saturating_sub(before);
    sample.set("cpu_ms", used.as_secs_f64() * 1e3 / f64::from(load.joins));
    sample.set("wall_ms", median(walls).context("at least one join")?);
    sample.set("bytes", bytes as f64);
    verify(kind, &kept, &load.chain)?;

    // Some peers write a while after they were written to; what they lose shows in the durable scenario.
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.stop().await;
    server.restart().await?;
    server.settle(Duration::from_millis(300), Duration::from_secs(5)).await;
    let before = server.cpu() + server.database_cpu();
    match join(&server, kind, &document, "bench-joiner-restarted").await {
        Ok(joined) => {
            sample.set("restarted_wall_ms", joined.wall.as_secs_f64() * 1e3);
            server.settle(Duration::from_millis(300), Duration::from_secs(10)).await;
            let used = (server.cpu() + server.database_cpu()).saturating_sub(before);
            sample.set("restarted_cpu_ms", used.as_secs_f64() * 1e3);
        }
        Err(error) => sample.notes.push(format!("after a restart: {error:#}")),
    }
    sample.set("resident_mib", server.resident_bytes() as f64 / f64::from(1 << 20));
    Ok(sample)
}

struct Joined {
    wall: Duration,
    bytes: u64,
    session: Session,
}

async fn join(server: &Server<'_>, kind: Kind, document: &Document, name: &str) -> Result<Joined> {
    let session = Session::new(kind.dialect(), name.to_owned(), document.clone(), 0).keep_content();
    let began = Instant::now();
    let mut client = Client::connect(&server.address(document), session).await?;
    client.until(PATIENCE, Session::is_joined).await?;
    ensure!(client.session.held() > 0, "the server gave an empty document");
    let wall = began.elapsed();
    let bytes = client.traffic.bytes_down;
    let (session, closing) = client.into_session();
    closing.await;
    Ok(Joined { wall, bytes, session })
}

/// Loads what a client received, and compares the text.
fn verify(kind: Kind, session: &Session, chain: &Chain) -> Result<()> {
    let text = if kind.dialect() == Dialect::Yjs {
        let document = crate::workload::yjs_document();
        for update in session.kept() {
            document.transact_mut().apply_update(Update::decode_v1(update)?)?;
        }
        document.get_or_insert_text("text").get_string(&document.transact())
    } else {
        let mut document = AutoCommit::new();
        for entry in session.kept() {
            document.load_incremental(entry)?;
        }
        let (_, text) = document.get(ROOT, "text")?.context("the joined document has no text")?;
        document.text(&text)?
    };
    ensure!(text == chain.base_text(), "the joined document has another text than the uploaded one");
    Ok(())
}

async fn run_bare(environment: &Environment, kind: Kind, load: &Load) -> Result<Sample> {
    let server = Server::start(environment, kind).await?;
    // One download costs less than the kernel's clock resolves well.
    let downloads = load.joins * 20;
    let mut sample = Sample::default();
    let (mut walls, before) = (Vec::new(), server.cpu());
    for _ in 0..downloads {
        let began = Instant::now();
        match kind {
            Kind::BareAnswered => {
                let url = format!("ws://{}/blob", server.authority());
                let (mut socket, _) = tokio_tungstenite::connect_async(url).await?;
                let message = socket.next().await.context("the bare server sends one message")??;
                ensure!(message.len() == load.bytes, "the bare server sent something else");
            }
            _ => ensure!(http_get_bytes(server.authority(), "/file").await? > load.bytes, "a short file"),
        }
        walls.push(began.elapsed().as_secs_f64() * 1e3);
    }
    sample.set("cpu_ms", (server.cpu() - before).as_secs_f64() * 1e3 / f64::from(downloads));
    sample.set("wall_ms", median(walls).context("at least one download")?);
    sample.set("bytes", load.bytes as f64);
    let what = if kind == Kind::BareAnswered { "one WebSocket message" } else { "a file over HTTP" };
    sample.notes.push(format!("the same bytes as {what}"));
    Ok(sample)
}
