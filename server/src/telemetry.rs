//! What the node says about itself: logs on standard error, metrics for Prometheus.
//!
//! Metrics are handles made once, so that counting on the hot path is one atomic addition. Each node has a recorder
//! of its own; nothing global is installed, and several nodes may share a process.

use std::io::IsTerminal;
use std::time::Duration;

use isobar_protocol::ids::RegionName;
use isobar_protocol::replica::LinkStatus;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::replication::Lag;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Starts logging to standard error. `filter` has the syntax of `tracing_subscriber::EnvFilter`, such as
/// `info,isobar=debug`.
pub fn start_logging(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Why a document was materialised: opened with the CRDT instead of relayed as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaterialiseReason {
    /// A client uploaded a whole document chunk, which has to be split into changes.
    Upload,
    /// A base was made.
    Compaction,
    /// Another region sent a whole document that is here in part.
    Contents,
    /// A client that knows only the first version of the sync protocol needs what is in a base.
    OldClient,
}

impl MaterialiseReason {
    const ALL: [Self; 4] = [Self::Upload, Self::Compaction, Self::Contents, Self::OldClient];

    fn label(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Compaction => "compaction",
            Self::Contents => "contents",
            Self::OldClient => "old_client",
        }
    }
}

/// Every metric of the node.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    pub connections: Gauge,
    pub connections_opened: Counter,
    pub frames_received: Counter,
    pub frame_bytes_received: Counter,
    pub frames_sent: Counter,
    pub frame_bytes_sent: Counter,
    pub sync_messages_shared: Counter,
    pub sync_messages_single: Counter,
    pub unavailable_sent: Counter,
    pub lossy_dropped: Counter,
    pub echoes_dropped: Counter,
    pub region_claims_dropped: Counter,
    pub commits: Counter,
    pub committed_changes: Counter,
    pub commit_seconds: Histogram,
    pub commit_batch_changes: Histogram,
    pub commit_retries: Counter,
    pub commit_queue_bytes: Gauge,
    pub documents_resident: Gauge,
    pub resident_bytes: Gauge,
    pub documents_loaded: Counter,
    pub documents_evicted: Counter,
    pub pending_changes: Gauge,
    pub index_loads: Counter,
    pub bases_made: Counter,
    pub base_seconds: Histogram,
    pub quarantines: Counter,
    pub in_quarantine: Gauge,
    pub replicated_refused: Counter,
    pub cold_changes: Counter,
    pub log_truncations: Counter,
    pub log_entries_held: Gauge,
    pub log_runs_erased: Counter,
    pub deletions_unerased: Gauge,
    pub links_refused: Counter,
    pub links_superfluous: Counter,
    pub cloned_regions: Counter,
    pub compactions_waiting: Gauge,
    pub origins: Gauge,
    pub replication_events_waiting: Gauge,
    pub presence_documents: Gauge,
    pub siblings: Gauge,
    pub keeps_links: Gauge,
    pub followed_changes: Counter,
    pub refreshes: Counter,
    pub notices_told: Counter,
    pub notices_heard: Counter,
    pub notices_dropped: Counter,
    pub notices_malformed: Counter,
    pub link_bytes_sent: Counter,
    pub link_bytes_before_compression: Counter,
    pub link_bytes_received: Counter,
    pub link_frames_waiting: Gauge,
    pub link_bytes_waiting: Gauge,
    pub link_answers_waiting: Gauge,
    pub link_answers_refused: Counter,
    pub origins_forked: Counter,
    pub documents_missing: Gauge,
    pub snapshot_documents: Counter,
    pub snapshot_bytes: Counter,
    pub searches: Counter,
    pub scrub_differences: Counter,
    pub scrub_repaired: Counter,
    pub scrub_finished_at: Gauge,
    pub verified_bytes: Counter,
    pub changes_damaged: Counter,
    pub bases_damaged: Counter,
    pub log_runs_damaged: Counter,
    pub damage_mended: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new()
            .set_buckets(&[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
            .expect("the buckets are not empty")
            .set_buckets_for_metric(
                metrics_exporter_prometheus::Matcher::Full("isobar_commit_batch_changes".into()),
                &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0],
            )
            .expect("the buckets are not empty")
            .build_recorder();
        let handle = recorder.handle();
        let metrics = metrics::with_local_recorder(&recorder, Registered::new);
        for reason in MaterialiseReason::ALL {
            // Present from the start, so that "never" reads as 0.
            metrics::with_local_recorder(&recorder, || materialised_counter(reason).increment(0));
        }
        metrics.into_metrics(recorder, handle)
    }

    /// The exposition text for Prometheus.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds histogram samples together; called now and then so that they do not pile up between scrapes.
    pub fn run_upkeep(&self) {
        self.handle.run_upkeep();
    }

    pub fn committed(&self, changes: usize, took: Duration) {
        self.commits.increment(1);
        self.committed_changes.increment(changes as u64);
        self.commit_batch_changes.record(changes as f64);
        self.commit_seconds.record(took.as_secs_f64());
    }

    /// Counts something refused from a client, by reason.
    pub fn refused(&self, reason: &'static str) {
        metrics::with_local_recorder(&self.recorder, || {
            counter!("isobar_refused_total", "reason" => reason).increment(1);
        });
    }

    /// Reports a link to another region, and what its peer lacks.
    pub fn link(&self, status: &LinkStatus, lag: Lag) {
        let region = status.region.as_str().to_owned();
        metrics::with_local_recorder(&self.recorder, || {
            let set = |name: &'static str, value: f64| gauge!(name, "region" => region.clone()).set(value);
            set("isobar_link_behind_changes", status.behind as f64);
            set("isobar_link_ahead_changes", status.ahead as f64);
            set("isobar_link_lag_seconds", lag.ms as f64 / 1_000.0);
            set("isobar_link_lag_bytes", lag.bytes as f64);
            set("isobar_link_in_flight_bytes", status.in_flight_bytes as f64);
            set("isobar_link_routes", status.routes as f64);
            set("isobar_link_fetches_snapshot", f64::from(u8::from(status.fetches_snapshot)));
            if let Some(round_trip_ms) = status.round_trip_ms {
                set("isobar_link_round_trip_seconds", round_trip_ms as f64 / 1_000.0);
            }
        });
    }

    /// Reports whether a region is linked.
    pub fn linked(&self, region: &RegionName, linked: bool) {
        let region = region.as_str().to_owned();
        metrics::with_local_recorder(&self.recorder, || {
            gauge!("isobar_link_up", "region" => region).set(f64::from(u8::from(linked)));
        });
    }

    /// Reports whether log entries are given up without a region.
    pub fn needs_snapshot(&self, region: &RegionName, needs_snapshot: bool) {
        let region = region.as_str().to_owned();
        metrics::with_local_recorder(&self.recorder, || {
            gauge!("isobar_region_needs_snapshot", "region" => region)
                .set(f64::from(u8::from(needs_snapshot)));
        });
    }

    /// The counters of what is sent to a region.
    pub fn link_sent(&self, region: &RegionName) -> LinkSent {
        let region = region.as_str().to_owned();
        metrics::with_local_recorder(&self.recorder, || LinkSent {
            bytes: counter!("isobar_link_region_bytes_sent_total", "region" => region.clone()),
            throttled_microseconds: counter!("isobar_link_throttled_microseconds_total", "region" => region),
        })
    }

    /// Counts a document that another region should have had and was not given.
    pub fn contents_withheld(&self, reason: &'static str) {
        metrics::with_local_recorder(&self.recorder, || {
            counter!("isobar_contents_withheld_total", "reason" => reason).increment(1);
        });
    }

    /// Counts a check with another region by what came of it.
    pub fn scrubbed(&self, outcome: &'static str) {
        metrics::with_local_recorder(&self.recorder, || {
            counter!("isobar_scrubs_total", "outcome" => outcome).increment(1);
        });
    }

    pub fn materialised(&self, reason: MaterialiseReason) {
        metrics::with_local_recorder(&self.recorder, || materialised_counter(reason).increment(1));
    }
}

/// What is sent to one region.
pub struct LinkSent {
    /// Compressed.
    pub bytes: Counter,
    /// Time for which something waited because the link's budget was spent.
    pub throttled_microseconds: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn materialised_counter(reason: MaterialiseReason) -> Counter {
    counter!("isobar_documents_materialised_total", "reason" => reason.label())
}

macro_rules! registered {
    ($($field:ident: $kind:ident = $name:literal, $help:literal;)*) => {
        /// The handles, before they are put beside their recorder.
        struct Registered { $($field: registered!(@type $kind),)* }

        impl Registered {
            fn new() -> Self {
                $(registered!(@describe $kind, $name, $help);)*
                Self { $($field: $kind!($name),)* }
            }

            fn into_metrics(self, recorder: PrometheusRecorder, handle: PrometheusHandle) -> Metrics {
                Metrics { recorder, handle, $($field: self.$field,)* }
            }
        }
    };
    (@type counter) => { Counter };
    (@type gauge) => { Gauge };
    (@type histogram) => { Histogram };
    (@describe counter, $name:literal, $help:literal) => { metrics::describe_counter!($name, $help) };
    (@describe gauge, $name:literal, $help:literal) => { metrics::describe_gauge!($name, $help) };
    (@describe histogram, $name:literal, $help:literal) => { metrics::describe_histogram!($name, $help) };
}

registered! {
    connections: gauge = "isobar_connections", "Client connections that are open.";
    connections_opened: counter = "isobar_connections_opened_total", "Client connections ever accepted.";
    frames_received: counter = "isobar_frames_received_total", "Frames received from clients.";
    frame_bytes_received: counter = "isobar_frame_bytes_received_total", "Bytes of frames received from clients.";
    frames_sent: counter = "isobar_frames_sent_total", "Frames sent to clients.";
    frame_bytes_sent: counter = "isobar_frame_bytes_sent_total", "Bytes of frames sent to clients.";
    sync_messages_shared: counter = "isobar_sync_messages_shared_total",
        "Sync messages sent that were built once for all clients that stand alike.";
    sync_messages_single: counter = "isobar_sync_messages_single_total", "Sync messages built for one client.";
    unavailable_sent: counter = "isobar_unavailable_sent_total", "Times a client was told that a document is unavailable.";
    lossy_dropped: counter = "isobar_lossy_frames_dropped_total",
        "Presence frames dropped: the client was slow, or its sender too fast.";
    echoes_dropped: counter = "isobar_echoes_dropped_total", "Frames dropped because their sender is not the connection's.";
    region_claims_dropped: counter = "isobar_region_claims_dropped_total",
        "Reports of clients about what a region's storage holds: only the region itself is believed.";
    commits: counter = "isobar_commits_total", "Transactions that appended changes.";
    committed_changes: counter = "isobar_committed_changes_total", "Changes made durable.";
    commit_seconds: histogram = "isobar_commit_seconds", "Time of one append transaction.";
    commit_batch_changes: histogram = "isobar_commit_batch_changes", "Changes in one append transaction.";
    commit_retries: counter = "isobar_commit_retries_total", "Appends repeated after a passing failure.";
    commit_queue_bytes: gauge = "isobar_commit_queue_bytes", "Bytes that wait for their commit.";
    documents_resident: gauge = "isobar_documents_resident", "Documents in memory.";
    resident_bytes: gauge = "isobar_documents_resident_bytes", "What the documents in memory occupy, roughly.";
    documents_loaded: counter = "isobar_documents_loaded_total", "Documents brought into memory.";
    documents_evicted: counter = "isobar_documents_evicted_total", "Documents dropped from memory.";
    pending_changes: gauge = "isobar_pending_changes", "Changes that wait for a dependency.";
    index_loads: counter = "isobar_base_index_loads_total", "Times the index of a base was read to check a change.";
    bases_made: counter = "isobar_bases_made_total", "Compactions: bases made and installed.";
    base_seconds: histogram = "isobar_base_seconds", "Time to make and install one base.";
    quarantines: counter = "isobar_documents_quarantined_total", "Documents quarantined because they do not apply.";
    in_quarantine: gauge = "isobar_documents_in_quarantine",
        "Documents of the region that are stored as quarantined, as counted some seconds ago.";
    replicated_refused: counter = "isobar_replicated_changes_refused_total",
        "Changes of other regions that were stored and do not fit their documents.";
    cold_changes: counter = "isobar_cold_changes_total",
        "Changes of other regions that were stored without their documents being in memory, or able to take them.";
    compactions_waiting: gauge = "isobar_compactions_waiting", "Documents that wait for a base; at most 1,024.";
    origins: gauge = "isobar_origins", "Logs of all regions that this one knows of; at most 65,536.";
    replication_events_waiting: gauge = "isobar_replication_events_waiting",
        "What links and the node have reported and replication has not taken yet; at most 256.";
    presence_documents: gauge = "isobar_presence_documents",
        "Documents that clients of the region have open; presence of other regions comes for 10,000 of them.";
    siblings: gauge = "isobar_siblings", "Other nodes of the region that share the database.";
    keeps_links: gauge = "isobar_keeps_links", "1 if this node keeps the region's links to others.";
    followed_changes: counter = "isobar_followed_changes_total", "Changes that siblings stored, offered to documents in memory.";
    refreshes: counter = "isobar_refreshes_total", "Documents in memory brought up to what siblings stored of them, read from the database.";
    notices_told: counter = "isobar_sibling_notices_told_total", "Notices to the other nodes of the region.";
    notices_heard: counter = "isobar_sibling_notices_heard_total", "Notices of the other nodes of the region.";
    notices_dropped: counter = "isobar_sibling_notices_dropped_total",
        "Notices to the other nodes of the region that were dropped: too much waited to be told.";
    notices_malformed: counter = "isobar_sibling_notices_malformed_total",
        "Notices of other nodes of the region that could not be read.";
    cloned_regions: counter = "isobar_cloned_regions_total", "Links refused, here or by the other end, because a region was started on two databases.";
    links_refused: counter = "isobar_links_refused_total", "Links refused because the other end proved nothing or the wrong thing.";
    links_superfluous: counter = "isobar_links_superfluous_total",
        "Links given up at once because their regions were linked already.";
    link_bytes_sent: counter = "isobar_link_bytes_sent_total", "Bytes sent to other regions, compressed.";
    link_bytes_before_compression: counter = "isobar_link_bytes_before_compression_total",
        "The same before compression.";
    link_bytes_received: counter = "isobar_link_bytes_received_total", "Bytes received from other regions, compressed.";
    link_frames_waiting: gauge = "isobar_link_frames_waiting", "Frames that wait to be sent to other regions.";
    link_bytes_waiting: gauge = "isobar_link_bytes_waiting",
        "Bytes of whole documents and of entries that catch up which wait to be sent to other regions.";
    link_answers_waiting: gauge = "isobar_link_answers_waiting",
        "Questions of other regions that are being answered or wait for it.";
    link_answers_refused: counter = "isobar_link_answers_refused_total",
        "Questions of other regions that were beyond what is answered at a time.";
    origins_forked: counter = "isobar_origins_forked_total", "Origins given up because two logs exist under their name.";
    documents_missing: gauge = "isobar_documents_missing",
        "Documents that lack some of what the vector claims: a snapshot lacked them.";
    snapshot_documents: counter = "isobar_snapshot_documents_total", "Documents that came with pages of snapshots.";
    snapshot_bytes: counter = "isobar_snapshot_bytes_total", "Bytes of documents that came with pages of snapshots.";
    searches: counter = "isobar_searches_total", "Documents looked for in other regions.";
    log_truncations: counter = "isobar_log_truncations_total", "Times that the logs were truncated.";
    log_entries_held: gauge = "isobar_log_entries_held",
        "Log entries that are kept because a region that is waited for has not stored them.";
    log_runs_erased: counter = "isobar_log_runs_erased_total",
        "Stored runs of log entries that were rewritten without deleted documents' changes.";
    deletions_unerased: gauge = "isobar_deletions_unerased",
        "Deletions whose documents' changes may still stand in stored logs, where nobody gets to read them.";
    scrub_differences: counter = "isobar_scrub_differences_total",
        "Documents found by a check to differ from another region's although nothing was on its way.";
    scrub_repaired: counter = "isobar_scrub_repaired_total", "Documents of these that came to the same by the check.";
    scrub_finished_at: gauge = "isobar_scrub_finished_seconds", "When the last check ended, in seconds of Unix time.";
    verified_bytes: counter = "isobar_stored_bytes_verified_total", "Stored bytes that were hashed again.";
    changes_damaged: counter = "isobar_stored_changes_damaged_total",
        "Stored changes, and rows of them, whose bytes were found to be damaged.";
    bases_damaged: counter = "isobar_stored_bases_damaged_total", "Stored bases that were found to be damaged.";
    log_runs_damaged: counter = "isobar_stored_log_runs_damaged_total",
        "Times that a stored run of log entries was found to be damaged when another region was to have it.";
    damage_mended: counter = "isobar_stored_damage_mended_total", "Documents with damaged bytes that were mended from another region.";
}
