//! One document, a server and its clients, driven step by step from a seed.

use automerge::{ChangeHash, ROOT, ReadDoc};

use crate::client::{Client, Memory};
use crate::rng::Rng;
use crate::server::Server;

/// What may happen in a case, beside edits, messages and commits. Percentages of steps.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    pub steps: usize,
    pub clients_max: usize,
    /// How often a client is an old one.
    pub v1: u32,
    pub read_only: u32,
    pub disconnects: u32,
    pub losses: u32,
    pub orphans: u32,
    pub false_positives: u32,
    pub merges: u32,
    pub failed_commits: u32,
    pub bases: u32,
    pub restarts: u32,
}

pub const CALM: Weather = Weather {
    steps: 60,
    clients_max: 4,
    v1: 0,
    read_only: 0,
    disconnects: 0,
    losses: 0,
    orphans: 0,
    false_positives: 0,
    merges: 0,
    failed_commits: 0,
    bases: 0,
    restarts: 0,
};

pub struct World {
    server: Server,
    clients: Vec<Client>,
    rng: Rng,
    weather: Weather,
    trace: bool,
}

/// Most rounds in which every side says what it has to say, until all are silent.
const ROUNDS_MAX: usize = 20;

fn ours(hash: &ChangeHash) -> isobar_protocol::ids::ChangeHash {
    isobar_protocol::ids::ChangeHash(hash.0)
}

impl World {
    pub fn new(seed: u64, weather: Weather, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let count = 2 + rng.below(weather.clients_max - 1);
        let mut clients: Vec<Client> = (1..=count).map(Client::new).collect();
        for client in &mut clients {
            client.v1 = rng.chance(weather.v1);
            if rng.chance(weather.read_only) {
                client.read_only = rng.chance(50);
                client.refused = rng.chance(50);
            }
        }
        let mut world = Self { server: Server::default(), clients, rng, weather, trace };
        // What each knows when the story begins: nothing, the same, or something of its own.
        for _ in 0..world.rng.below(12) {
            let at = world.any();
            world.clients[at].edit(&mut world.rng);
            if world.rng.chance(50) {
                world.merge();
            }
        }
        for at in 0..world.clients.len() {
            if world.rng.chance(80) {
                world.connect(at);
            }
        }
        world
    }

    fn say(&self, what: impl Fn() -> String) {
        if self.trace {
            eprintln!("{}", what());
        }
    }

    fn any(&mut self) -> usize {
        self.rng.below(self.clients.len())
    }

    pub fn run(&mut self) {
        for _ in 0..self.weather.steps {
            self.step();
        }
        self.settle();
        self.check();
        self.walk_in_step();
        self.admit_a_newcomer();
    }

    fn step(&mut self) {
        let at = self.any();
        if self.something_rare(at) {
            return;
        }
        match self.rng.below(10) {
            0 | 1 => {
                self.say(|| format!("{at} edits"));
                for _ in 0..=self.rng.below(3) {
                    self.clients[at].edit(&mut self.rng);
                }
            }
            2 | 3 => self.client_generates(at),
            4 | 5 => drop(self.server_receives(at)),
            6 | 7 => drop(self.server_generates(at)),
            8 => {
                let (from, to) = (self.server.graph.durable_end(), self.server.graph.staged_end());
                let end = self.rng.range(from, to);
                self.say(|| format!("commit {from}..{end} of {to}"));
                self.server.commit(end);
            }
            _ => drop(self.client_receives(at)),
        }
    }

    /// Returns whether anything happened.
    fn something_rare(&mut self, at: usize) -> bool {
        let weather = self.weather;
        if self.clients[at].link.is_none() {
            if self.rng.chance(30) {
                self.connect(at);
            }
            return true;
        }
        if self.rng.chance(weather.disconnects) {
            self.say(|| format!("{at} is disconnected"));
            self.clients[at].disconnect();
        } else if self.rng.chance(weather.losses) {
            if self.rng.chance(60) {
                self.say(|| format!("{at} loses everything"));
                self.clients[at].lose_everything();
            } else {
                let keep_state = self.rng.chance(50);
                self.say(|| format!("{at} falls back, keeps state: {keep_state}"));
                self.clients[at].fall_back(keep_state, &mut self.rng);
            }
        } else if self.rng.chance(weather.orphans) {
            self.say(|| format!("{at} sends orphans"));
            self.clients[at].send_orphans(&mut self.rng);
        } else if self.rng.chance(weather.merges) {
            self.merge();
        } else if self.rng.chance(weather.failed_commits) {
            self.fail_commit();
        } else if self.rng.chance(weather.read_only) {
            self.say(|| format!("{at} toggles read-only"));
            self.clients[at].toggle_read_only();
        } else if self.rng.chance(weather.bases) {
            self.change_base();
        } else if self.rng.chance(weather.restarts) {
            self.restart();
        } else {
            return false;
        }
        true
    }

    fn server_hashes(&self) -> Vec<ChangeHash> {
        self.server.stored.iter().map(|it| ChangeHash(it.hash.0)).collect()
    }

    fn connect(&mut self, at: usize) {
        let memory = match self.rng.below(10) {
            0..=4 => Memory::Saved,
            5 | 6 => Memory::Fresh,
            7 | 8 if self.weather.false_positives > 0 => Memory::Boasting,
            9 if self.weather.false_positives > 0 => Memory::Mistaken,
            _ => Memory::Saved,
        };
        self.say(|| format!("{at} connects, {memory:?}"));
        let hashes = self.server_hashes();
        self.clients[at].connect(memory, &hashes, &mut self.rng);
    }

    /// One client gets another's changes by some other way than the server.
    fn merge(&mut self) {
        let (from, to) = (self.any(), self.any());
        if from != to && !self.clients[to].read_only {
            self.say(|| format!("{to} merges {from}"));
            let mut other = self.clients[from].doc.clone();
            self.clients[to].doc.merge(&mut other).expect("documents merge");
        }
    }

    /// Staged changes are lost; so are the connections, since some of them counted on those.
    fn fail_commit(&mut self) {
        self.say(|| "a commit fails".to_owned());
        let staged = self.server.graph.durable_end()..self.server.graph.staged_end();
        self.server.graph.roll_back_staged();
        if !staged.is_empty() {
            self.clients.iter_mut().for_each(Client::disconnect);
        }
    }

    fn change_base(&mut self) {
        match self.rng.below(4) {
            0 => self.server.graph.detach_index(),
            1 => self.server.attach_index(),
            _ => {
                let (from, to) = (self.server.graph.tail_start(), self.server.graph.durable_end());
                let cut = self.rng.range(from, to);
                self.say(|| format!("base of {cut}, tail to {to}"));
                if cut > 0 {
                    self.server.compact(cut);
                }
            }
        }
    }

    fn restart(&mut self) {
        self.say(|| "the server restarts".to_owned());
        self.clients.iter_mut().for_each(Client::disconnect);
        self.server.restart(&mut self.rng);
    }

    fn client_generates(&mut self, at: usize) {
        let hashes = self.server_hashes();
        let client = &mut self.clients[at];
        let before = client.sent;
        if self.rng.chance(self.weather.false_positives) {
            client.generate_with_false_positives(&hashes, &mut self.rng);
        } else {
            client.generate();
        }
        if self.clients[at].sent > before {
            self.say(|| format!("{at} sends"));
        }
    }

    fn server_receives(&mut self, at: usize) -> bool {
        let Some(link) = &mut self.clients[at].link else { return false };
        let Some(bytes) = link.to_server.pop_front() else { return false };
        self.server.receive(&mut link.session, bytes.clone());
        self.say(|| format!("server takes from {at}: {}", told(&bytes)));
        true
    }

    fn server_generates(&mut self, at: usize) -> bool {
        let v1 = self.clients[at].v1;
        let Some(link) = &mut self.clients[at].link else { return false };
        let Some(bytes) = self.server.generate(&mut link.session) else { return false };
        if v1 {
            assert_readable_by_v1(&bytes);
        }
        link.to_client.push_back(bytes.clone());
        self.say(|| format!("server sends to {at}: {}", told(&bytes)));
        true
    }

    /// A standard client answers at once, or, rarely here, a little later.
    fn client_receives(&mut self, at: usize) -> bool {
        let Some(told) = self.clients[at].receive() else { return false };
        assert!(told.iter().all(|head| self.server.is_stored(&ours(head))), "told is stored");
        self.say(|| format!("{at} takes"));
        let own = self.clients[at].doc.get_heads();
        if own.iter().all(|head| told.contains(head)) {
            // Acknowledged.
            assert!(
                self.clients[at]
                    .doc
                    .get_changes(&[])
                    .iter()
                    .all(|it| self.server.is_stored(&ours(&it.hash())))
            );
        }
        if self.rng.chance(90) {
            self.client_generates(at);
        }
        true
    }

    /// Lets everybody speak until all are silent.
    fn settle(&mut self) {
        let hold_refusals = self.rng.chance(50);
        for at in 0..self.clients.len() {
            if self.clients[at].read_only && !hold_refusals {
                self.clients[at].toggle_read_only();
            }
            if self.clients[at].link.is_none() {
                self.connect(at);
            }
        }
        self.weather.false_positives = 0;
        self.exchange();
        // An empty document is exchanged differently from one that has something.
        if let (true, Some(writer)) = (self.server.stored.is_empty(), self.clients.iter().position(in_step)) {
            while self.clients[writer].doc.get_heads().is_empty() {
                self.clients[writer].edit(&mut self.rng);
            }
            self.exchange();
        }
    }

    /// A standard client speaks when it has connected or changed something, and after each message it gets.
    fn exchange(&mut self) {
        for client in &mut self.clients {
            client.generate();
        }
        let mut messages = 0;
        for _ in 0..ROUNDS_MAX {
            let before = messages;
            for at in 0..self.clients.len() {
                while self.server_receives(at) {
                    messages += 1;
                }
            }
            self.server.commit_all();
            for at in 0..self.clients.len() {
                self.server_generates(at);
                while self.clients[at].receive().is_some() {
                    messages += 1;
                    self.clients[at].generate();
                }
            }
            if messages == before {
                return;
            }
        }
        panic!("not silent after {ROUNDS_MAX} rounds and {messages} messages");
    }

    fn check(&mut self) {
        self.server.check();
        let heads = self.server.heads();
        for client in &mut self.clients {
            let at = client.name - 1;
            let mut own: Vec<_> = client.doc.get_heads().iter().map(ours).collect();
            own.sort_unstable();
            if !client.read_only && !client.refused {
                assert_eq!(own, heads, "client {at} and the server have the same heads");
                continue;
            }
            if !client.refused {
                let changes = client.doc.get_changes(&[]);
                assert!(changes.iter().all(|it| self.server.is_stored(&ours(&it.hash()))), "{at} is stored");
            }
            if !client.read_only {
                for change in &self.server.stored {
                    let there = client.doc.get_change_by_hash(&ChangeHash(change.hash.0)).is_some();
                    assert!(there, "client {at} has all that the server has");
                }
            }
        }
    }

    /// Once all have the same, an edit costs one message to each reader and one answer from each.
    fn walk_in_step(&mut self) {
        let Some(writer) = self.clients.iter().position(in_step) else { return };
        for _ in 0..2 {
            self.clients.iter_mut().for_each(Client::reset_counts);
            let before = self.server.stored.len();
            for _ in 0..=self.rng.below(2) {
                self.clients[writer].edit(&mut self.rng);
            }
            self.exchange();
            let edits = self.server.stored.len() - before;
            self.check();
            for (at, client) in self.clients.iter().enumerate() {
                if !in_step(client) {
                    // An old client cannot say that it takes nothing, so it is tried a few times.
                    let most = if client.v1 && client.read_only { 12 } else { 4 };
                    assert!(client.sent + client.received <= most, "client {at} is not kept busy");
                    continue;
                }
                assert_eq!(client.received, 1, "one message to client {at}");
                assert_eq!(client.sent, 1, "one message from client {at}");
                let news = if at == writer { 0 } else { edits };
                assert_eq!(client.changes_received, news, "what is new, and nothing to whom it is from");
            }
        }
    }

    fn admit_a_newcomer(&mut self) {
        let mut newcomer = Client::new(100);
        newcomer.v1 = self.rng.chance(self.weather.v1);
        self.clients.push(newcomer);
        let at = self.clients.len() - 1;
        self.connect(at);
        self.exchange();
        let newcomer = &self.clients[at];
        let expected = if self.server.stored.is_empty() { (1, 0) } else { (2, 1) };
        assert_eq!((newcomer.sent, newcomer.received), expected, "a question, the document, an answer");
        let mut union = automerge::Automerge::new();
        let stored = self.server.stored.iter();
        union
            .apply_changes(stored.map(|it| automerge::Change::from_bytes(it.bytes.to_vec()).expect("stored")))
            .expect("stored changes apply");
        let newcomer = &mut self.clients[at];
        assert_eq!(newcomer.doc.get_heads(), union.get_heads());
        let theirs = newcomer.doc.hydrate(ROOT, None).expect("hydrate");
        assert_eq!(theirs, union.hydrate(None));
    }
}

/// Whether it both takes and gives.
fn in_step(client: &Client) -> bool {
    !client.read_only && !client.refused
}

/// A message in a few words, for the story of a case.
fn told(bytes: &[u8]) -> String {
    use automerge::sync::Message;

    let message = Message::decode(bytes).expect("a message");
    let short =
        |hashes: &[ChangeHash]| hashes.iter().map(|it| it.to_string()[..6].to_owned()).collect::<Vec<_>>();
    let have =
        message.have.iter().map(|it| (short(&it.last_sync), it.bloom.to_bytes().len())).collect::<Vec<_>>();
    let sizes = message.changes.iter().map(<[u8]>::len).collect::<Vec<_>>();
    let (heads, need) = (short(&message.heads), short(&message.need));
    format!("heads {heads:?} need {need:?} have {have:?} changes {sizes:?} {:?}", message.flags)
}

fn assert_readable_by_v1(bytes: &[u8]) {
    use isobar_protocol::chunk::{ChunkKind, chunks};
    use isobar_protocol::sync_message::{SyncMessage, SyncVersion};

    let message = SyncMessage::decode(bytes.to_vec().into()).expect("our own message");
    assert_eq!(message.version, SyncVersion::V1);
    for entry in &message.changes {
        let all: Vec<_> = chunks(entry.clone()).map(|it| it.expect("our own chunk").kind).collect();
        assert!(matches!(all[..], [ChunkKind::Change | ChunkKind::DeflatedChange]), "one change an entry");
    }
}
