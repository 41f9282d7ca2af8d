//! A sync server on samod with its own file storage, set up like the stock JavaScript one: documents are sent to
//! those who ask for them and announced to nobody. Usage: `samod-server PORT DATA_DIR`.

use axum::{Router, extract::ws::WebSocketUpgrade, routing::get};
use samod::{PeerId, Repo, ShareConfig, storage::TokioFilesystemStorage};

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let port: u16 = arguments.next().and_then(|port| port.parse().ok()).expect("first argument: a port");
    let data = arguments.next().expect("second argument: a directory");

    let repo = Repo::build_tokio()
        .with_peer_id(PeerId::from("storage-server-bench"))
        .with_storage(TokioFilesystemStorage::new(data))
        .with_share_policy(ShareConfig::read_write().with_announce(false))
        .load()
        .await;
    let url = format!("ws://127.0.0.1:{port}/").parse::<url::Url>().expect("a valid URL");
    let acceptor = repo.make_acceptor(url).expect("a running repo");

    let app = Router::new().route(
        "/",
        get(move |upgrade: WebSocketUpgrade| {
            let acceptor = acceptor.clone();
            async move {
                let upgrade = upgrade.max_message_size(256 << 20).max_frame_size(256 << 20);
                upgrade.on_upgrade(move |socket| async move {
                    let _ = acceptor.accept_axum(socket, None);
                })
            }
        }),
    );
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a free port");
    axum::serve(listener, app).await.expect("the server runs until it is killed");
}
