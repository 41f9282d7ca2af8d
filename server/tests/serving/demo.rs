//! The demo, as a process: three regions and their control.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use automerge::AutoCommit;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Client, DEADLINE, document_id, eventually, get, in_time, number, put};

struct Demo {
    child: Child,
    port: u16,
    lines: mpsc::Receiver<String>,
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A first port beside which all that a demo needs are free.
fn free_port() -> u16 {
    let offsets = [0, 1, 2, 20, 21, 22, 40, 41, 42, 90];
    // Tests that run at once begin at different places.
    let begin = (std::process::id() % 200) as u16;
    let candidates = (0..200).map(|step| 10_000 + (begin + step) % 200 * 100);
    let free = |port: u16| offsets.iter().all(|it| TcpListener::bind(loopback(port + it)).is_ok());
    candidates.into_iter().find(|&port| free(port)).expect("some ports are free")
}

fn command(directory: &TempDir, port: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isobar"));
    command.args(["demo", "--port", &port.to_string(), "--data", "data"]).current_dir(directory.path());
    // Settings are those of regions that are served, not of demos.
    command.env("ISOBAR_REGION", "elsewhere").stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

impl Demo {
    fn start(mut command: Command, port: u16) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, port, lines }
    }

    /// What it prints until it is ready.
    fn announcement(&self) -> String {
        let mut said = String::new();
        while !said.contains("regions/singapore/kill") {
            said += &(self.lines.recv_timeout(DEADLINE).expect("it gets ready") + "\n");
        }
        said
    }

    fn clients(&self, index: u16) -> SocketAddr {
        loopback(self.port + 20 * index)
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, text) = request(loopback(self.port + 90), method, path, body).await;
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}")))
    }

    async fn done(&self, path: &str) -> Value {
        let (status, state) = self.ask("POST", path, "").await;
        assert_eq!(status, 200, "{path}: {state}");
        state
    }

    /// Ends it as Ctrl-C does.
    fn interrupt(mut self) -> bool {
        let asked = Command::new("kill").arg("-INT").arg(self.child.id().to_string()).status().unwrap();
        assert!(asked.success());
        self.child.wait().unwrap().success()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    in_time("an HTTP answer", async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: demo\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    })
    .await
}

fn region_states(state: &Value) -> Vec<&str> {
    state["regions"].as_array().unwrap().iter().map(|it| it["state"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn three_regions_are_up_and_one_that_is_killed_comes_back_with_what_it_acknowledged() {
    let directory = TempDir::new().unwrap();
    let port = free_port();
    let demo = Demo::start(command(&directory, port), port);
    let said = demo.announcement();
    for (index, name) in ["frankfurt", "virginia", "singapore"].into_iter().enumerate() {
        let clients = demo.clients(index as u16);
        assert!(said.contains(&format!("{name:<10} clients ws://{clients} ")), "{said}");
        assert_eq!(get(clients, "/readyz").await.0, 200);
        assert_eq!(get(loopback(clients.port() + 2), "/readyz").await.0, 200);
    }
    assert_eq!(said.matches("  curl ").count(), 3, "{said}");
    let (_, state) = demo.ask("GET", "/state", "").await;
    assert_eq!(region_states(&state), ["up", "up", "up"]);

    let document = document_id("document");
    let mut before = Client::join(demo.clients(0), "before").await;
    before.share(&document, AutoCommit::new()).await;
    before.write(&document, |doc| put(doc, "edits", 1)).await;
    assert_eq!(region_states(&demo.done("/regions/frankfurt/kill").await), ["down", "up", "up"]);
    before.ended().await;
    assert!(Client::try_connect(demo.clients(0)).await.is_err(), "a region that is down listens");
    assert_eq!(get(demo.clients(1), "/readyz").await.0, 200, "the others go on");
    assert_eq!(demo.ask("POST", "/regions/frankfurt/kill", "").await.0, 409);

    assert_eq!(region_states(&demo.done("/regions/frankfurt/start").await), ["up", "up", "up"]);
    assert_eq!(demo.ask("POST", "/regions/frankfurt/start", "").await.0, 409);
    let mut after = Client::join(demo.clients(0), "after").await;
    after.fetch(&document).await;
    assert_eq!(number(&after.open(&document).doc, "edits"), Some(1));
    assert_eq!(after.open(&document).heads(), before.open(&document).heads());

    // A second one takes nothing away from the first.
    for port in [port, free_port()] {
        let mut second = command(&directory, port);
        let output = second.stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains("another demo"), "{said}");
    }
    after.write(&document, |doc| put(doc, "edits", 2)).await;
    assert!(demo.interrupt(), "it drains and ends well");
}

#[tokio::test]
async fn links_are_cut_slowed_and_healed_by_either_order_of_their_regions() {
    let directory = TempDir::new().unwrap();
    let port = free_port();
    let mut command = command(&directory, port);
    command.args(["--delay", "singapore-virginia=7"]);
    let demo = Demo::start(command, port);
    demo.announcement();
    let link = |state: &Value, index: usize| {
        let link = &state["links"][index];
        (
            link["state"].as_str().unwrap().to_owned(),
            link["one_way_ms"].as_u64().unwrap(),
            link["bytes_per_second"].clone(),
        )
    };
    let open = |ms| ("open".to_owned(), ms, Value::Null);
    let (_, state) = demo.ask("GET", "/state", "").await;
    assert_eq!(state["links"][0]["between"], serde_json::json!(["frankfurt", "virginia"]));
    assert_eq!([0, 1, 2].map(|it| link(&state, it)), [45, 80, 7].map(open));

    let state = demo.done("/links/virginia/frankfurt/cut").await;
    assert_eq!(link(&state, 0), ("cut".to_owned(), 45, Value::Null));
    assert_eq!([1, 2].map(|it| link(&state, it)), [80, 7].map(open));
    let (status, state) = demo
        .ask("POST", "/links/virginia/singapore/slow", r#"{"one_way_ms": 300, "bytes_per_second": 5000}"#)
        .await;
    assert_eq!((status, link(&state, 2)), (200, ("open".to_owned(), 300, Value::from(5000))));
    demo.done("/links/frankfurt/virginia/heal").await;
    let state = demo.done("/links/virginia/singapore/heal").await;
    assert_eq!([0, 1, 2].map(|it| link(&state, it)), [45, 80, 7].map(open));

    // What is wrong is said, and changes nothing.
    for (path, body, status, says) in [
        ("/links/frankfurt/paris/cut", "", 404, "frankfurt/virginia"),
        ("/links/frankfurt/frankfurt/cut", "", 404, "no link"),
        ("/regions/paris/kill", "", 404, "singapore"),
        ("/links/frankfurt/virginia/slow", r#"{"one_way_ms": 60001}"#, 422, "one_way_ms"),
        ("/links/frankfurt/virginia/slow", r#"{"bytes_per_second": 1}"#, 422, "bytes_per_second"),
        ("/links/frankfurt/virginia/slow", r#"{"slowness": 1}"#, 422, "slowness"),
        ("/links/frankfurt/virginia/slow", "slowly", 400, "JSON"),
        ("/nothing", "", 404, "GET /"),
    ] {
        let (answered, error) = demo.ask("POST", path, body).await;
        assert_eq!(answered, status, "{path}: {error}");
        assert!(error["error"].as_str().unwrap().contains(says), "{path}: {error}");
    }
    let (_, state) = demo.ask("GET", "/state", "").await;
    assert_eq!([0, 1, 2].map(|it| link(&state, it)), [45, 80, 7].map(open));
    assert!(request(loopback(port + 90), "GET", "/", "").await.1.contains("POST /links/A/B/cut"));
}

#[tokio::test]
async fn a_fresh_demo_leaves_nothing_behind() {
    let directory = TempDir::new().unwrap();
    let port = free_port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_isobar"));
    command.args(["demo", "--fresh", "--port", &port.to_string()]).current_dir(directory.path());
    command.env("TMPDIR", directory.path()).stdin(Stdio::null()).stdout(Stdio::piped());
    let demo = Demo::start(command, port);
    demo.announcement();
    let made = || std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(made(), 1, "its databases, in one directory");
    let start = Instant::now();
    assert!(demo.interrupt());
    assert!(start.elapsed() < DEADLINE);
    eventually("it is removed", async || made() == 0).await;
}

#[test]
fn a_delay_between_no_two_regions_is_refused() {
    let directory = TempDir::new().unwrap();
    for (delay, says) in [
        ("frankfurt-paris=4", "singapore"),
        ("frankfurt-virginia", "A-B=MILLISECONDS"),
        ("frankfurt-virginia=far", "A-B=MILLISECONDS"),
        ("frankfurt-virginia=60001", "60000"),
    ] {
        let output = command(&directory, free_port())
            .args(["--delay", delay])
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains(says), "{delay}: {said}");
        assert!(!directory.path().join("data").exists());
    }
}
