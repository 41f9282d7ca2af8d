//! Simulated distance between real sockets.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use isobar::demo::links::{BUFFER_BYTES_MAX, Delivered, Distance, Passage, Proxy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::support::{eventually, in_time};

const ONE_WAY: Duration = Duration::from_millis(60);

/// How long nothing is to happen for: several times as long as it would take if it did.
const QUIET: Duration = Duration::from_millis(400);

struct Line {
    target: TcpListener,
    proxy: Proxy,
}

impl Line {
    async fn start(distance: Distance) -> Self {
        let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(target.local_addr().unwrap(), distance).await.unwrap();
        Self { target, proxy }
    }

    /// Both ends of a connection through the proxy.
    async fn connect(&self) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(self.proxy.address()).await.unwrap();
        let (far, _) = in_time("the proxy connects", self.target.accept()).await.unwrap();
        (near, far)
    }
}

async fn say(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

async fn heard(stream: &mut TcpStream, bytes: usize) -> String {
    let mut text = vec![0; bytes];
    in_time("bytes arrive", stream.read_exact(&mut text)).await.unwrap();
    String::from_utf8(text).unwrap()
}

/// Asserts that nothing comes, and that the connection does not end.
async fn nothing_comes(stream: &mut TcpStream) {
    let came = timeout(QUIET, stream.read_u8()).await;
    assert!(came.is_err(), "something came of a way that is cut: {came:?}");
}

/// Asserts that the connection ends, not in order.
async fn is_reset(stream: &mut TcpStream) {
    let end = in_time("the connection ends", stream.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset, "{end}");
}

#[tokio::test]
async fn bytes_take_the_one_way_time_in_each_direction_and_keep_their_order() {
    let line = Line::start(Distance::of(ONE_WAY)).await;
    let (mut near, mut far) = line.connect().await;
    let start = Instant::now();
    say(&mut near, "there").await;
    assert_eq!(heard(&mut far, 5).await, "there");
    assert!(start.elapsed() >= ONE_WAY, "{:?}", start.elapsed());
    say(&mut far, "back").await;
    assert_eq!(heard(&mut near, 4).await, "back");
    assert!(start.elapsed() >= 2 * ONE_WAY, "{:?}", start.elapsed());
    assert_eq!(line.proxy.delivered(), Delivered { connections: 1, bytes_there: 5, bytes_back: 4 });

    // What is sent after the way has become shorter does not overtake what is on its way.
    let long = Distance::of(5 * ONE_WAY);
    line.proxy.set_distance(long);
    assert_eq!(line.proxy.distance(), long);
    let start = Instant::now();
    let before = line.proxy.delivered().bytes_there;
    say(&mut near, "first").await;
    assert!(timeout(2 * ONE_WAY, far.peek(&mut [0; 1])).await.is_err(), "it came too early");
    line.proxy.set_distance(Distance::of(Duration::ZERO));
    say(&mut near, "second").await;
    assert_eq!(heard(&mut far, 11).await, "firstsecond");
    assert!(start.elapsed() >= 5 * ONE_WAY, "{:?}", start.elapsed());
    assert_eq!(line.proxy.delivered().bytes_there, before + 11);

    // An end is no quicker than bytes, and leaves the other direction open.
    line.proxy.set_distance(Distance::of(ONE_WAY));
    let start = Instant::now();
    near.shutdown().await.unwrap();
    assert_eq!(in_time("the end", far.read(&mut [0; 1])).await.unwrap(), 0);
    assert!(start.elapsed() >= ONE_WAY);
    say(&mut far, "still here").await;
    assert_eq!(heard(&mut near, 10).await, "still here");
    drop(far);
    assert_eq!(in_time("the end", near.read(&mut [0; 1])).await.unwrap(), 0);
    eventually("the connection is not counted any more", async || line.proxy.delivered().connections == 0)
        .await;
}

#[tokio::test]
async fn a_bandwidth_is_shared_by_all_connections() {
    const RATE: u64 = 200_000;
    let distance = Distance { one_way: Duration::ZERO, bytes_per_second: Some(RATE) };
    let line = Line::start(distance).await;
    let (mut near, mut far) = line.connect().await;
    let (mut other_near, mut other_far) = line.connect().await;
    let start = Instant::now();
    let text = "x".repeat(RATE as usize / 10);
    let both = async {
        tokio::join!(say(&mut near, &text), say(&mut other_near, &text));
        tokio::join!(heard(&mut far, text.len()), heard(&mut other_far, text.len()))
    };
    assert_eq!(both.await, (text.clone(), text.clone()));
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_cut_delivers_nothing_and_healing_lets_only_new_connections_through() {
    let line = Line::start(Distance::of(ONE_WAY)).await;
    let (mut near, mut far) = line.connect().await;
    say(&mut near, "before").await;
    assert_eq!(heard(&mut far, 6).await, "before");

    // Also what is already on its way is held.
    say(&mut near, "lost").await;
    say(&mut far, "lost").await;
    line.proxy.cut();
    assert_eq!(line.proxy.passage(), Passage::Cut);
    let mut late = in_time("it is accepted", TcpStream::connect(line.proxy.address())).await.unwrap();
    say(&mut late, "anybody there?").await;
    tokio::join!(nothing_comes(&mut near), nothing_comes(&mut far), nothing_comes(&mut late));
    assert!(timeout(QUIET, line.target.accept()).await.is_err(), "somebody got through");
    assert_eq!(line.proxy.delivered().bytes_there, 6);
    assert_eq!(line.proxy.delivered().bytes_back, 0);

    line.proxy.heal();
    tokio::join!(is_reset(&mut near), is_reset(&mut far), is_reset(&mut late));
    let (mut near, mut far) = line.connect().await;
    say(&mut near, "after").await;
    assert_eq!(heard(&mut far, 5).await, "after");
    // Healing what is whole harms nobody.
    line.proxy.heal();
    say(&mut far, "and on").await;
    assert_eq!(heard(&mut near, 6).await, "and on");
}

#[tokio::test]
async fn a_refusal_resets_old_and_new_connections() {
    let line = Line::start(Distance::of(Duration::ZERO)).await;
    let (mut near, mut far) = line.connect().await;
    line.proxy.refuse();
    tokio::join!(is_reset(&mut near), is_reset(&mut far));
    let mut late = TcpStream::connect(line.proxy.address()).await.unwrap();
    is_reset(&mut late).await;
    line.proxy.heal();
    let (mut near, mut far) = line.connect().await;
    say(&mut near, "after").await;
    assert_eq!(heard(&mut far, 5).await, "after");
}

#[tokio::test]
async fn a_target_that_is_not_there_resets_who_connects_after_a_round_trip() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target: SocketAddr = nobody.local_addr().unwrap();
    drop(nobody);
    let proxy = Proxy::start(target, Distance::of(ONE_WAY)).await.unwrap();
    let start = Instant::now();
    let mut near = TcpStream::connect(proxy.address()).await.unwrap();
    is_reset(&mut near).await;
    assert!(start.elapsed() >= 2 * ONE_WAY);
    // It need not have been there from the start.
    let target = TcpListener::bind(target).await.unwrap();
    let _near = TcpStream::connect(proxy.address()).await.unwrap();
    in_time("the proxy connects", target.accept()).await.unwrap();
}

#[tokio::test]
async fn a_sender_is_held_back_when_its_target_does_not_read() {
    let line = Line::start(Distance::of(Duration::ZERO)).await;
    let (mut near, mut far) = line.connect().await;
    let (block, mut taken) = (vec![7; 1 << 20], 0);
    // The sockets' own buffers come on top: a few MiB on each side.
    while let Ok(written) = timeout(QUIET, near.write(&block)).await {
        taken += written.unwrap();
        assert!(taken < BUFFER_BYTES_MAX + (32 << 20), "nobody holds the sender back");
    }
    assert!(taken >= BUFFER_BYTES_MAX, "it was held back at {taken} bytes");
    let read = async {
        let mut read = 0;
        let mut buffer = vec![0; 1 << 20];
        while read < taken {
            read += far.read(&mut buffer).await.unwrap();
        }
        read
    };
    assert_eq!(in_time("all of it arrives", read).await, taken);
}
