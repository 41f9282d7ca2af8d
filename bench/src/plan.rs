//! One run of the benchmark: prepares servers and workloads, runs the scenarios, reports.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::database;
use crate::report;
use crate::results::{Results, Sample};
use crate::scenario::{Name, Sizes, durable, fanout, idle, join, many, sample_of};
use crate::servers::{Environment, Kind, Wanted, target_directory};
use crate::trace::{self, Paper};
use crate::workload::{Chain, Seed};

pub struct Options {
    pub is_quick: bool,
    pub scenarios: Vec<Name>,
    pub servers: Vec<Kind>,
    pub rounds: Option<u32>,
    pub data: Option<PathBuf>,
    pub isobar: Option<PathBuf>,
    pub may_install: bool,
    pub out: PathBuf,
}

/// The longest that one scenario may take on one server in one round.
const SAMPLE_PATIENCE: Duration = Duration::from_secs(240);

/// Changes prepared for each durable writer; at 50 writers enough for 100,000 a second over ten seconds.
const DURABLE_EDITS: usize = 20_000;

/// How long bare inserts are measured.
const INSERT_TIME: Duration = Duration::from_secs(2);

struct Run {
    environment: Environment,
    sizes: Sizes,
    servers: Vec<Kind>,
    results: Results,
    started: Instant,
    paper: Option<Paper>,
}

pub async fn run(options: Options) -> Result<()> {
    let mut sizes = if options.is_quick { Sizes::quick() } else { Sizes::full() };
    sizes.rounds = options.rounds.unwrap_or(sizes.rounds);
    sizes.slow_rounds = options.rounds.unwrap_or(sizes.slow_rounds);
    let wanted = Wanted {
        kinds: options.servers.clone(),
        isobar: options.isobar.clone(),
        may_install: options.may_install,
    };
    let (environment, missing) = Environment::prepare(&wanted).await?;
    let mut results = Results::default();
    for (kind, reason) in &missing {
        eprintln!("{}: not available: {reason}", kind.name());
        results.skipped.insert(kind.name().to_owned(), reason.clone());
    }
    let servers = options.servers.iter().copied().filter(|kind| !missing.contains_key(kind)).collect();
    let mut run = Run { environment, sizes, servers, results, started: Instant::now(), paper: None };
    run.open_paper(&options)?;
    for scenario in &options.scenarios {
        run.scenario(*scenario).await?;
    }
    report::print(&run.results);
    let path = report::write_json(&run.results, &run.sizes, &options.out)?;
    println!("\n{} s; figures of every round in {}", run.started.elapsed().as_secs(), path.display());
    Ok(())
}

impl Run {
    async fn scenario(&mut self, scenario: Name) -> Result<()> {
        let all = self.servers.clone();
        self.servers.retain(|kind| scenario.concerns(*kind));
        let outcome = self.run_scenario(scenario).await;
        self.servers = all;
        outcome
    }

    async fn run_scenario(&mut self, scenario: Name) -> Result<()> {
        match scenario {
            Name::Fanout => self.fanout().await,
            Name::Many => self.many().await,
            Name::Idle => self.idle().await,
            Name::Large => self.large().await,
            Name::Join => self.join().await,
            Name::Durable => self.durable().await,
        }
    }

    /// Opens the large document if a scenario needs it; without its data those scenarios are skipped, and say so.
    fn open_paper(&mut self, options: &Options) -> Result<()> {
        let needing: Vec<Name> =
            options.scenarios.iter().copied().filter(|name| name.needs_trace()).collect();
        if needing.is_empty() {
            return Ok(());
        }
        let cache = target_directory()?.join("bench-cache");
        let Some(data) = &options.data else {
            let reason = format!("no --data directory with {} was given", trace::FILE);
            for name in needing {
                self.results.skipped.insert(format!("scenario {name:?}").to_lowercase(), reason.clone());
            }
            return Ok(());
        };
        let paper = Paper::load(data, &cache)?;
        self.environment.file = Some(paper.automerge_path.clone());
        self.paper = Some(paper);
        Ok(())
    }

    /// Runs `sample` for every server in every round, interleaved.
    async fn rounds(
        &mut self,
        scenario: Name,
        name: &'static str,
        mut sample: impl AsyncFnMut(&Environment, Kind) -> Result<Sample>,
    ) {
        let rounds = if scenario.is_slow() { self.sizes.slow_rounds } else { self.sizes.rounds };
        for round in 1..=rounds {
            for kind in self.servers.clone() {
                let began = Instant::now();
                let running = tokio::time::timeout(SAMPLE_PATIENCE, sample(&self.environment, kind));
                let outcome = running.await.context("took too long").and_then(|outcome| outcome);
                let sample = sample_of(outcome);
                let at = self.started.elapsed().as_secs();
                let took = began.elapsed().as_secs_f32();
                let failure = sample.failure.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
                eprintln!("[{at:4} s] {name}, round {round}, {}: {took:.1} s{failure}", kind.name());
                self.results.add(name, kind, sample);
            }
        }
    }

    async fn fanout(&mut self) -> Result<()> {
        let edits = self.sizes.fanout_seconds * fanout::EDITS_PER_SECOND;
        let chain = Arc::new(Chain::build(Seed::small()?, edits as usize, 1)?);
        for readers in self.sizes.fanout_readers.clone() {
            let name = match readers {
                100 => report::FANOUT_100,
                _ => report::FANOUT_300,
            };
            let load = fanout::Load { chain: Arc::clone(&chain), readers, drain: Duration::from_secs(20) };
            self.rounds(Name::Fanout, name, async |environment, kind| {
                fanout::run(environment, kind, &load).await
            })
            .await;
        }
        Ok(())
    }

    async fn many(&mut self) -> Result<()> {
        let sizes = &self.sizes;
        let (documents, clients) = (sizes.many_documents, sizes.many_clients);
        let edits = (clients * sizes.many_seconds) as usize;
        let load = many::Load {
            chain: Arc::new(Chain::build(Seed::small()?, edits, clients as usize)?),
            documents,
            clients,
        };
        self.rounds(Name::Many, report::MANY, async |environment, kind| {
            many::run(environment, kind, &load).await
        })
        .await;
        Ok(())
    }

    async fn idle(&mut self) -> Result<()> {
        let chain = Arc::new(Chain::build(Seed::small()?, 1, 1)?);
        let load = idle::Load {
            chain,
            connections: self.sizes.idle_connections,
            documents: self.sizes.idle_documents,
            seconds: self.sizes.idle_seconds,
        };
        self.rounds(Name::Idle, report::IDLE, async |environment, kind| {
            idle::run(environment, kind, &load).await
        })
        .await;
        Ok(())
    }

    async fn large(&mut self) -> Result<()> {
        let Some(paper) = &self.paper else { return Ok(()) };
        let edits = self.sizes.large_seconds * fanout::EDITS_PER_SECOND;
        let chain = Arc::new(Chain::build(paper.seed()?, edits as usize, 1)?);
        // Servers that load the document for every change are far behind when the writer ends.
        let load = fanout::Load { chain, readers: self.sizes.large_readers, drain: Duration::from_secs(30) };
        self.rounds(Name::Large, report::LARGE, async |environment, kind| {
            fanout::run(environment, kind, &load).await
        })
        .await;
        Ok(())
    }

    async fn join(&mut self) -> Result<()> {
        let Some(paper) = &self.paper else { return Ok(()) };
        let chain = Arc::new(Chain::build(paper.seed()?, 0, 1)?);
        let load = join::Load { bytes: paper.automerge_bytes(), chain, joins: self.sizes.joins };
        self.rounds(Name::Join, report::JOIN, async |environment, kind| {
            join::run(environment, kind, &load).await
        })
        .await;
        Ok(())
    }

    async fn durable(&mut self) -> Result<()> {
        let chain = Arc::new(Chain::build(Seed::small()?, DURABLE_EDITS, 1)?);
        let load = durable::Load {
            chain,
            clients: self.sizes.durable_clients,
            window: self.sizes.durable_window,
            duration: Duration::from_secs(self.sizes.durable_seconds.into()),
        };
        // The inserts run beside nothing else, in each round, so that they see the same disk as the servers.
        self.rounds(Name::Durable, report::DURABLE, async |environment, kind| {
            let mut sample = durable::run(environment, kind, &load).await?;
            let scratch = environment.scratch();
            match (kind, environment.postgres()) {
                (Kind::IsobarSqlite, _) => {
                    let rate = database::sqlite_inserts_per_s(scratch, &load.chain, INSERT_TIME).await?;
                    sample.set("inserts_per_s", rate);
                }
                (Kind::IsobarPostgres, Some(postgres)) => {
                    let rate = database::postgres_inserts_per_s(postgres, &load.chain, INSERT_TIME).await?;
                    sample.set("inserts_per_s", rate);
                }
                _ => {}
            }
            Ok(sample)
        })
        .await;
        Ok(())
    }
}
