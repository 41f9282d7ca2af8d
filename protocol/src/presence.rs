//! Which ephemeral messages are news.
//!
//! An author numbers the messages of a session upwards. A message that is not beyond the last one seen of its author
//! and session is a repetition or out of date, and is not relayed. The memory is bounded: when it is full, the
//! author first heard of earliest is forgotten, which at worst relays one message twice.

use std::collections::{HashMap, VecDeque};

/// Authors and sessions remembered for one document. A room of this size is at the limit of what presence is for.
const AUTHORS_MAX: usize = 1_024;

/// The newest message seen of each author and session.
#[derive(Debug, Default)]
pub struct Recent {
    counts: HashMap<(String, String), u64>,
    /// In the order in which they were first heard of.
    order: VecDeque<(String, String)>,
}

impl Recent {
    /// Notes a message; returns whether it is news.
    pub fn is_news(&mut self, sender: &str, session: &str, count: u64) -> bool {
        let author = (sender.to_owned(), session.to_owned());
        if let Some(last) = self.counts.get_mut(&author) {
            let news = count > *last;
            *last = count.max(*last);
            return news;
        }
        if self.order.len() >= AUTHORS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
        self.order.push_back(author.clone());
        self.counts.insert(author, count);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_and_older_messages_are_no_news() {
        let mut recent = Recent::default();
        assert!(recent.is_news("a", "s", 1));
        assert!(!recent.is_news("a", "s", 1));
        assert!(recent.is_news("a", "s", 3));
        assert!(!recent.is_news("a", "s", 2));
        assert!(recent.is_news("a", "t", 1), "another session counts on its own");
        assert!(recent.is_news("b", "s", 1));
    }

    #[test]
    fn the_memory_is_bounded_and_forgets_the_oldest() {
        let mut recent = Recent::default();
        for author in 0..=AUTHORS_MAX {
            assert!(recent.is_news(&author.to_string(), "s", 5));
        }
        assert_eq!(recent.counts.len(), AUTHORS_MAX);
        assert!(recent.is_news("0", "s", 5), "the first was forgotten");
        assert!(!recent.is_news(&AUTHORS_MAX.to_string(), "s", 5));
    }
}
