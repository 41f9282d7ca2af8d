//! What happened, for whoever has to find out why a seed failed.
//!
//! A trace is kept per thread, so that it survives a panic of the schedule. It is written only when somebody wants it: a
//! seed that fails is run again with its trace, which is the same by construction.

use std::cell::RefCell;

thread_local! {
    static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Begins a trace on this thread, or sees to it that none is kept.
pub fn begin(wanted: bool) {
    LINES.with(|lines| *lines.borrow_mut() = wanted.then(Vec::new));
}

/// Takes the trace.
pub fn end() -> Vec<String> {
    LINES.with(|lines| lines.borrow_mut().take()).unwrap_or_default()
}

/// Adds a line, if a trace is kept.
pub fn note(line: impl FnOnce() -> String) {
    LINES.with(|lines| {
        if let Some(lines) = lines.borrow_mut().as_mut() {
            lines.push(line());
        }
    });
}
