//! A node in this process, on free ports.

use std::net::SocketAddr;
use std::sync::Arc;

use isobar::app::App;
use isobar::config::{ServeArgs, Settings};
use isobar::storage::Storage;
use isobar_protocol::replica::LinkId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{eventually, in_time};

pub struct Node {
    pub clients: SocketAddr,
    pub admin: SocketAddr,
    /// Where other regions link, if they may.
    pub peers: Option<SocketAddr>,
    /// What its parts share.
    pub parts: Arc<isobar::node::Node>,
    stop: oneshot::Sender<()>,
    running: JoinHandle<anyhow::Result<()>>,
}

/// The defaults, on free ports; stored bytes are not verified, which would load documents that tests hold and count.
pub fn settings() -> Settings {
    let mut settings = Settings::load(&ServeArgs::default()).unwrap();
    settings.verify_rate = 0;
    settings.listen.set_port(0);
    settings.admin_listen.set_port(0);
    settings
}

/// A node's link to a region, once it is up.
pub async fn linked_to(node: &Node, region: &str) -> LinkId {
    let mut link = None;
    eventually("the regions are linked", async || {
        let links = node.parts.replication.as_ref().unwrap().view().links;
        link = links.iter().find(|it| it.region.as_str() == region).map(|it| it.link);
        link.is_some()
    })
    .await;
    link.unwrap()
}

impl Node {
    pub async fn start(storage: impl Storage) -> Self {
        Self::start_with(settings(), storage).await
    }

    pub async fn start_with(settings: Settings, storage: impl Storage) -> Self {
        Self::start_on(settings, Arc::new(storage)).await
    }

    pub async fn start_on(settings: Settings, storage: Arc<dyn Storage>) -> Self {
        let app = App::start_with(settings, storage).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        Self {
            clients: app.client_address,
            admin: app.admin_address,
            peers: app.peer_address,
            parts: app.node.clone(),
            stop,
            running: tokio::spawn(app.run_until(async {
                let _ = stopped.await;
            })),
        }
    }

    /// Stops the node as an operator would.
    pub async fn stop(self) -> anyhow::Result<()> {
        let _ = self.stop.send(());
        in_time("the node stops", self.running).await.unwrap()
    }

    /// Stops the node without letting it finish anything. Its seat is free afterwards.
    pub async fn kill(self) {
        self.running.abort();
        assert!(in_time("the node stops", self.running).await.unwrap_err().is_cancelled());
    }

    /// Begins to stop the node; wait for it with [`Node::ended`] on what this returns.
    pub fn begin_stop(self) -> JoinHandle<anyhow::Result<()>> {
        let _ = self.stop.send(());
        self.running
    }

    /// Waits for the node to end by itself.
    pub async fn ended(self) -> anyhow::Result<()> {
        let Self { stop, running, .. } = self;
        let ended = in_time("the node ends", running).await.unwrap();
        drop(stop);
        ended
    }

    /// The value of a metric. One with labels is 0 as long as that has not been counted.
    pub async fn metric(&self, name: &str) -> f64 {
        metric(self.admin, name).await
    }

    /// How often something was refused for this reason.
    pub async fn refused(&self, reason: &str) -> f64 {
        self.metric(&format!("isobar_refused_total{{reason=\"{reason}\"}}")).await
    }
}

pub async fn metric(admin: SocketAddr, name: &str) -> f64 {
    let (status, text) = get(admin, "/metrics").await;
    assert_eq!(status, 200);
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    assert!(line.is_some() || name.contains('{'), "there is no metric {name}");
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// Asks for a page.
pub async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    ask(address, "GET", path).await
}

/// Sends an HTTP request without a body.
pub async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
    in_time("an HTTP answer", async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    })
    .await
}
