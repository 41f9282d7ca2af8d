//! The floor: a WebSocket server that knows nothing of documents.
//!
//! Every frame whose first byte says so is sent to everybody else in the room that the path names; all others are
//! read and dropped. It stores nothing, checks nothing, and drops what a slow reader has not fetched. On the same
//! runtime as the node, it is what fan-out, a connection and a download cost before any of Isobar's work.
//!
//! - `/room/NAME`: the broadcast.
//! - `/file`: the file given on the command line, read and served over HTTP.
//! - `/blob`: the same file as one WebSocket message.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use bytes::Bytes;
use tokio::sync::broadcast;

use crate::session::BARE_BROADCAST;

/// Room for reading from and writing to a socket: what the node gives each connection.
const SOCKET_BUFFER_BYTES: usize = 4 << 10;

/// Frames that a slow reader may be behind before it loses some.
const ROOM_FRAMES: usize = 1024;

struct Rooms {
    rooms: Mutex<HashMap<String, broadcast::Sender<(u64, Bytes)>>>,
    next_member: std::sync::atomic::AtomicU64,
    file: Option<PathBuf>,
}

/// Serves until the process is killed. Prints `clients: ws://…` when it listens.
pub async fn serve(file: Option<PathBuf>) -> Result<()> {
    let rooms = Arc::new(Rooms { rooms: Mutex::default(), next_member: 0.into(), file });
    let app = Router::new()
        .route("/room/{name}", get(enter))
        .route("/file", get(download))
        .route("/blob", get(blob))
        .with_state(rooms);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("clients: ws://{}", listener.local_addr()?);
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        let _ = stream.set_nodelay(true);
    });
    Ok(axum::serve(listener, app).await?)
}

async fn enter(
    Path(name): Path<String>,
    State(rooms): State<Arc<Rooms>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let sender = {
        let mut rooms = rooms.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.entry(name).or_insert_with(|| broadcast::channel(ROOM_FRAMES).0).clone()
    };
    let member = rooms.next_member.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    upgrade
        .read_buffer_size(SOCKET_BUFFER_BYTES)
        .write_buffer_size(SOCKET_BUFFER_BYTES)
        .on_upgrade(move |socket| Box::pin(relay(socket, sender, member)))
}

async fn relay(mut socket: WebSocket, room: broadcast::Sender<(u64, Bytes)>, member: u64) {
    let mut frames = room.subscribe();
    loop {
        tokio::select! {
            received = socket.recv() => match received {
                Some(Ok(Message::Binary(frame))) if frame.first() == Some(&BARE_BROADCAST) => {
                    let _ = room.send((member, frame));
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
            frame = frames.recv() => match frame {
                Ok((sender, _)) if sender == member => {}
                Ok((_, frame)) => {
                    if socket.send(Message::Binary(frame)).await.is_err() {
                        return;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
        }
    }
}

async fn download(State(rooms): State<Arc<Rooms>>) -> Result<Bytes, StatusCode> {
    let file = rooms.file.as_ref().ok_or(StatusCode::NOT_FOUND)?;
    tokio::fs::read(file).await.map(Bytes::from).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

async fn blob(State(rooms): State<Arc<Rooms>>, upgrade: WebSocketUpgrade) -> Result<Response, StatusCode> {
    let bytes = download(State(rooms)).await?;
    Ok(upgrade.on_upgrade(async move |mut socket| {
        let _ = socket.send(Message::Binary(bytes)).await;
        let _ = socket.recv().await;
    }))
}
