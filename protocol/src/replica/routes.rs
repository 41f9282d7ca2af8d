//! Choosing from whom each origin is taken.

use super::{Link, LinkId, Moment, Origin, Replica};
use crate::config::ROUTE_PATIENCE_MS;
use crate::ids::{OriginId, Seq};
use crate::link::LinkFrame;

/// From whom an origin is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) link: LinkId,
    /// Since when another peer has been ahead of this one, if one is.
    overtaken_at: Option<Moment>,
    /// When it was asked for again, unless the right entries have come since.
    pub(super) renewed_at: Option<Moment>,
}

impl Replica {
    /// Looks at every origin, and subscribes it where it is to be had best.
    pub(super) fn choose_routes(&mut self, now: Moment) {
        let taken = self.origins.iter().filter(|(_, it)| !it.own && !it.sibling && !it.forked);
        let ids: Vec<OriginId> = taken.map(|(id, _)| *id).collect();
        for id in ids {
            self.choose_route(now, id);
        }
        self.start_fetch(now);
    }

    fn choose_route(&mut self, now: Moment, id: OriginId) {
        let origin = &self.origins[&id];
        let current = origin.route;
        let best = self.best_link(id, origin);
        let Some((best, ahead)) = best else {
            self.origins.get_mut(&id).expect("it is known").route = None;
            return;
        };
        let Some(route) = current else { return self.take_route(id, best, None) };
        if route.link == best {
            self.origins.get_mut(&id).expect("it is known").route =
                Some(Route { overtaken_at: None, ..route });
            return;
        }
        let is_direct = self.links[&best].peer.region == origin.region;
        let usable = self.links.get(&route.link).is_some_and(|it| self.reachable(it, id, origin).is_some());
        let theirs = self.links.get(&route.link).and_then(|it| it.theirs.get(&id)).copied().unwrap_or(Seq(0));
        if !usable || is_direct {
            return self.take_route(id, best, None);
        }
        let since = match (ahead > theirs, route.overtaken_at) {
            (false, _) => None,
            (true, None) => Some(now),
            (true, Some(since)) if now.0 - since.0 >= ROUTE_PATIENCE_MS => {
                return self.take_route(id, best, None);
            }
            (true, since) => since,
        };
        self.origins.get_mut(&id).expect("it is known").route = Some(Route { overtaken_at: since, ..route });
    }

    /// The link from which an origin is to be had best, and how far its peer has it: the origin's own region's, else the
    /// one that is farthest, else the nearest.
    fn best_link(&self, id: OriginId, origin: &Origin) -> Option<(LinkId, Seq)> {
        let usable = self.links.iter().filter_map(|(link, known)| {
            let seq = self.reachable(known, id, origin)?;
            let is_direct = known.peer.region == origin.region;
            let nearness = u64::MAX - known.round_trip_ms.unwrap_or(u64::MAX);
            Some((*link, (is_direct, seq, nearness)))
        });
        usable.max_by_key(|(_, worth)| *worth).map(|(link, (_, seq, _))| (link, seq))
    }

    /// How far the peer of a link has an origin, if it can be taken from there.
    fn reachable(&self, known: &Link, id: OriginId, origin: &Origin) -> Option<Seq> {
        let seq = known.theirs.get(&id)?;
        let truncated = known.floors.get(&id).is_some_and(|floor| *floor > origin.received.0);
        (!truncated && self.may_take(known, &origin.group)).then_some(*seq)
    }

    fn take_route(&mut self, id: OriginId, link: LinkId, renewed_at: Option<Moment>) {
        let origin = self.origins.get_mut(&id).expect("it is known");
        let (after, chain) = origin.received;
        let previous = origin.route.replace(Route { link, overtaken_at: None, renewed_at });
        if let Some(previous) = previous
            && previous.link != link
            && self.links.contains_key(&previous.link)
        {
            self.send(previous.link, LinkFrame::Unsubscribe { origin: id });
        }
        self.send(link, LinkFrame::Subscribe { origin: id, after, chain });
    }

    /// Asks for an origin again from where it stands.
    pub(super) fn renew_route(&mut self, now: Moment, id: OriginId) {
        let Some(route) = self.origins.get(&id).and_then(|origin| origin.route) else { return };
        self.take_route(id, route.link, Some(now));
    }
}
