//! Two databases under one region's name: a copy was started beside its original, or a region beside what it was restored from.
//!
//! Each node names the nodes that were started on its database, the *lineage*. So a node that takes over from another, or its
//! sibling, knows the one that is linked, and its link takes the place of that one's, whose end may not have been noticed. A
//! node that does not know it is on another database. Then the one that is linked either is gone, and will time out, or
//! it answers: there are two. The link that is up stays, the other is refused, and operators on both sides are told.
//!
//! A node that the linked one knows was its sibling, and may believe for a moment that it keeps the links, or it is the original
//! of a copy that was made while it ran. Only the latter goes on trying.

use std::time::{Duration, Instant};

use isobar_protocol::link::LinkFrame;
use isobar_protocol::link::handshake::NodeId;
use isobar_protocol::replica::LinkId;

use super::{Task, Up};
use crate::replication::Verdict;

/// How long a former sibling may be mistaken about who keeps the links: it looks each second, and gives an answer up after
/// five.
const MISTAKEN_MAX: Duration = Duration::from_secs(15);

/// After so long without another attempt a doubt is forgotten; who goes on trying pauses for half a minute at most.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(120);

/// What is thought of a link since somebody else claimed to be of its region.
pub(super) struct Doubt {
    since: Instant,
    /// When somebody else tried last.
    tried: Instant,
    /// By this node's clock, as pings have it.
    asked_ms: u64,
    /// The peer has given a sign of life since.
    answered: bool,
    /// The node that operators were told of last.
    reported: Option<NodeId>,
}

impl Task {
    /// Whether a link takes the place of the one that is up to the same region.
    ///
    /// Whoever dialled without knowing whom it would reach keeps what it has, and the other end never hears of the
    /// second link. When both dialled at once, each sees its own before the other's.
    pub(super) fn judge(&mut self, previous: LinkId, newcomer: &Up) -> Verdict {
        let Some(linked) = self.links.get(&previous) else { return Verdict::Kept };
        if linked.peer.node == newcomer.peer.node {
            let stays = newcomer.dialled_here || linked.dialled_by_first && !newcomer.dialled_by_first;
            return if stays { Verdict::Superfluous } else { Verdict::Kept };
        }
        let succeeds = newcomer.lineage.as_ref().is_none_or(|it| it.contains(&linked.peer.node));
        if succeeds { Verdict::Kept } else { self.doubt(previous, newcomer.peer.node) }
    }

    /// A node on another database claims to be of a linked region.
    fn doubt(&mut self, linked: LinkId, newcomer: NodeId) -> Verdict {
        let now_ms = self.now().0;
        let Some(up) = self.links.get_mut(&linked) else { return Verdict::Kept };
        let now = Instant::now();
        up.doubt.take_if(|it| it.tried + FORGOTTEN_AFTER < now);
        let was_sibling = up.lineage.as_ref().is_some_and(|it| it.contains(&newcomer));
        let Some(doubt) = &mut up.doubt else {
            let begun = Doubt { since: now, tried: now, asked_ms: now_ms, answered: false, reported: None };
            up.doubt = Some(begun);
            up.outgoing.push(LinkFrame::Ping { sent_ms: now_ms });
            return Verdict::Superfluous;
        };
        doubt.tried = now;
        if !doubt.answered || was_sibling && now < doubt.since + MISTAKEN_MAX {
            return Verdict::Superfluous;
        }
        self.parts.metrics.cloned_regions.increment(1);
        if doubt.reported.replace(newcomer) != Some(newcomer) {
            tracing::error!(region = %up.peer.region,
                linked = %uuid::Uuid::from_bytes(up.peer.node.0), refused = %uuid::Uuid::from_bytes(newcomer.0),
                "a region was started twice, on two databases: stop one, see the runbook");
        }
        Verdict::Cloned
    }

    /// A peer has returned a ping.
    pub(super) fn sign_of_life(&mut self, link: LinkId, sent_ms: u64) {
        let doubt = self.links.get_mut(&link).and_then(|up| up.doubt.as_mut());
        if let Some(doubt) = doubt.filter(|doubt| sent_ms >= doubt.asked_ms) {
            doubt.answered = true;
        }
    }

    /// Another region is linked to a node on another database that goes by this region's name.
    pub(super) fn refused_as_clone(&mut self, link: LinkId) {
        let Some(by) = self.links.get(&link).map(|up| up.peer.region.clone()) else { return };
        self.parts.metrics.cloned_regions.increment(1);
        if self.cloned_by.insert(by.clone()) {
            tracing::error!(%by, region = %self.replica.region(),
                "this region was started twice, on two databases, and the other is linked: stop one, see the runbook");
        }
    }
}
