//! Walking a change's operations without decoding them.
//!
//! All columns are walked in step, run by run, so the cost follows the bytes and not the number of operations that
//! they claim. Each rule below is either what `automerge::Change::from_bytes` needs in order to accept the change,
//! or what keeps a stock receiver from a panic or from a document that it saves and cannot load again:
//!
//! - Every column has exactly as many values as there are operations.
//! - Actor indexes are within the change's list, and each listed actor is used.
//! - An operation refers only to operations with a smaller counter, and counters are at least 1.
//! - Values have the form that their type calls for, and use up the column of values.
//! - Inserts have an element as key; only inserts may stand at the head.
//! - Only what puts, increments or begins a mark has a value, only marks have names, and a deletion has something to
//!   delete.
//!
//! Whether the operations that are referred to exist is not known here: that takes the document.

use super::{ChangeError, ColumnProblem};
use crate::columns::{BooleanRuns, Column, DeltaLane, Lane, RunValue, ValueRuns};
use crate::leb128::{ReadError, Reader};

/// The names (specifications) of the columns that automerge 0.12 writes in a change.
mod name {
    pub const OBJECT_ACTOR: u32 = 1;
    pub const OBJECT_COUNTER: u32 = 2;
    pub const KEY_ACTOR: u32 = 17;
    pub const KEY_COUNTER: u32 = 19;
    pub const KEY_TEXT: u32 = 21;
    pub const INSERT: u32 = 52;
    pub const ACTION: u32 = 66;
    pub const VALUE_TYPE: u32 = 86;
    pub const VALUE: u32 = 87;
    pub const PREDECESSORS: u32 = 112;
    pub const PREDECESSOR_ACTOR: u32 = 113;
    pub const PREDECESSOR_COUNTER: u32 = 115;
    pub const EXPAND: u32 = 148;
    pub const MARK_NAME: u32 = 165;
}

/// What an operation does.
mod action {
    pub const MAKE_MAP: u64 = 0;
    pub const PUT: u64 = 1;
    pub const MAKE_LIST: u64 = 2;
    pub const DELETE: u64 = 3;
    pub const MAKE_TEXT: u64 = 4;
    pub const INCREMENT: u64 = 5;
    pub const MAKE_TABLE: u64 = 6;
    pub const MARK: u64 = 7;
}

/// The low four bits of a value's type.
mod value {
    pub const NULL: u64 = 0;
    pub const TRUE: u64 = 2;
    pub const UNSIGNED: u64 = 3;
    pub const SIGNED: u64 = 4;
    pub const FLOAT: u64 = 5;
    pub const TEXT: u64 = 6;
    pub const COUNTER: u64 = 8;
    pub const TIMESTAMP: u64 = 9;
}

/// What the walk needs to know of the rest of the change.
pub(super) struct Context {
    pub start_op: u64,
    /// Actors that the change names besides its own.
    pub other_actors: usize,
    /// How many of them sort before its own.
    pub actors_before_own: usize,
    pub operations_max: u64,
}

/// A stretch of operations that differ in counters only.
#[derive(Clone, Copy)]
struct Stretch {
    /// The counter of the first of them.
    counter: u64,
    rows: u64,
}

/// Checks the operations and returns how many there are.
pub(super) fn walk(columns: &[Column<'_>], context: &Context) -> Result<u64, ChangeError> {
    let mut walk = Walk::new(columns, context)?;
    let mut operations = 0_u64;
    while let Some(rows) = walk.next_stretch()? {
        let stretch = Stretch { counter: context.start_op.saturating_add(operations), rows };
        operations = operations.saturating_add(rows);
        if operations > context.operations_max {
            let operations_max = context.operations_max;
            return Err(ChangeError::TooManyOperations { operations, operations_max });
        }
        walk.check(stretch)?;
        walk.advance(rows);
    }
    walk.check_ended()?;
    Ok(operations)
}

fn refuse<T>(column: u32, problem: ColumnProblem) -> Result<T, ChangeError> {
    Err(ChangeError::Column { column, problem })
}

/// Attributes a failure to read to a column.
fn within<T>(column: u32, result: Result<T, ReadError>) -> Result<T, ChangeError> {
    result.map_err(|error| ChangeError::Column { column, problem: ColumnProblem::Runs { at: error.at } })
}

/// The bytes of each column, none for those that are left out.
#[derive(Default)]
struct Parts<'a> {
    object_actor: &'a [u8],
    object_counter: &'a [u8],
    key_actor: &'a [u8],
    key_counter: &'a [u8],
    key_text: &'a [u8],
    insert: &'a [u8],
    action: &'a [u8],
    value_type: &'a [u8],
    value: &'a [u8],
    predecessors: &'a [u8],
    predecessor_actor: &'a [u8],
    predecessor_counter: &'a [u8],
    expand: &'a [u8],
    mark_name: &'a [u8],
}

impl<'a> Parts<'a> {
    /// Sorts the columns, and refuses what columns of a change must not be.
    fn new(columns: &[Column<'a>]) -> Result<Self, ChangeError> {
        let mut parts = Self::default();
        let mut before = None;
        for column in columns {
            let name = column.name();
            if column.is_deflated() {
                return refuse(name, ColumnProblem::Deflated);
            }
            if before >= Some(name) {
                return refuse(name, ColumnProblem::Order);
            }
            if column.data.is_empty() {
                return refuse(name, ColumnProblem::Empty);
            }
            before = Some(name);
            *parts.part(name)? = column.data;
        }
        Ok(parts)
    }

    fn part(&mut self, name: u32) -> Result<&mut &'a [u8], ChangeError> {
        Ok(match name {
            name::OBJECT_ACTOR => &mut self.object_actor,
            name::OBJECT_COUNTER => &mut self.object_counter,
            name::KEY_ACTOR => &mut self.key_actor,
            name::KEY_COUNTER => &mut self.key_counter,
            name::KEY_TEXT => &mut self.key_text,
            name::INSERT => &mut self.insert,
            name::ACTION => &mut self.action,
            name::VALUE_TYPE => &mut self.value_type,
            name::VALUE => &mut self.value,
            name::PREDECESSORS => &mut self.predecessors,
            name::PREDECESSOR_ACTOR => &mut self.predecessor_actor,
            name::PREDECESSOR_COUNTER => &mut self.predecessor_counter,
            name::EXPAND => &mut self.expand,
            name::MARK_NAME => &mut self.mark_name,
            _ => return refuse(name, ColumnProblem::Unknown),
        })
    }
}

fn values<'a, V: RunValue<'a>>(data: &'a [u8]) -> Lane<ValueRuns<'a, V>> {
    match data {
        [] => Lane::absent(),
        data => Lane::new(ValueRuns::new(data)),
    }
}

fn booleans(data: &[u8]) -> Lane<BooleanRuns<'_>> {
    match data {
        [] => Lane::absent(),
        data => Lane::new(BooleanRuns::new(data)),
    }
}

type Unsigned<'a> = Lane<ValueRuns<'a, u64>>;

struct Walk<'a> {
    action: Unsigned<'a>,
    object_actor: Unsigned<'a>,
    object_counter: Unsigned<'a>,
    key_actor: Unsigned<'a>,
    key_counter: DeltaLane<'a>,
    key_text: Lane<ValueRuns<'a, &'a str>>,
    insert: Lane<BooleanRuns<'a>>,
    value_type: Unsigned<'a>,
    values: Reader<'a>,
    predecessors: Unsigned<'a>,
    predecessor_actor: Unsigned<'a>,
    predecessor_counter: DeltaLane<'a>,
    expand: Lane<BooleanRuns<'a>>,
    mark_name: Lane<ValueRuns<'a, &'a str>>,
    /// Whether an operation so far has had the expand bit.
    any_expands: bool,
    actors: Actors,
    /// How many more predecessors are allowed.
    predecessors_left: u64,
}

impl<'a> Walk<'a> {
    fn new(columns: &[Column<'a>], context: &Context) -> Result<Self, ChangeError> {
        let parts = Parts::new(columns)?;
        Ok(Self {
            // Nothing stands for no operations here, and for nulls in the others.
            action: Lane::new(ValueRuns::new(parts.action)),
            object_actor: values(parts.object_actor),
            object_counter: values(parts.object_counter),
            key_actor: values(parts.key_actor),
            key_counter: DeltaLane::new(values(parts.key_counter)),
            key_text: values(parts.key_text),
            insert: booleans(parts.insert),
            value_type: values(parts.value_type),
            values: Reader::new(parts.value),
            predecessors: values(parts.predecessors),
            predecessor_actor: values(parts.predecessor_actor),
            predecessor_counter: DeltaLane::new(values(parts.predecessor_counter)),
            expand: booleans(parts.expand),
            mark_name: values(parts.mark_name),
            any_expands: false,
            actors: Actors::new(context),
            predecessors_left: context.operations_max,
        })
    }

    /// How many of the next operations differ in counters only; `None` after the last.
    fn next_stretch(&mut self) -> Result<Option<u64>, ChangeError> {
        let rows = within(name::ACTION, self.action.available())?;
        if rows == 0 {
            return Ok(None);
        }
        let others = [
            (name::OBJECT_ACTOR, self.object_actor.available()),
            (name::OBJECT_COUNTER, self.object_counter.available()),
            (name::KEY_ACTOR, self.key_actor.available()),
            (name::KEY_COUNTER, self.key_counter.lane.available()),
            (name::KEY_TEXT, self.key_text.available()),
            (name::INSERT, self.insert.available()),
            (name::VALUE_TYPE, self.value_type.available()),
            (name::PREDECESSORS, self.predecessors.available()),
            (name::EXPAND, self.expand.available()),
            (name::MARK_NAME, self.mark_name.available()),
        ];
        let mut least = rows;
        for (column, available) in others {
            match within(column, available)? {
                0 => return refuse(column, ColumnProblem::Count),
                available => least = least.min(available),
            }
        }
        Ok(Some(least))
    }

    fn advance(&mut self, rows: u64) {
        self.action.advance(rows);
        self.object_actor.advance(rows);
        self.object_counter.advance(rows);
        self.key_actor.advance(rows);
        self.key_counter.advance(rows);
        self.key_text.advance(rows);
        self.insert.advance(rows);
        self.value_type.advance(rows);
        self.predecessors.advance(rows);
        self.expand.advance(rows);
        self.mark_name.advance(rows);
    }

    /// After the last operation: nothing is left over anywhere.
    fn check_ended(&mut self) -> Result<(), ChangeError> {
        let ends = [
            (name::OBJECT_ACTOR, self.object_actor.is_at_end()),
            (name::OBJECT_COUNTER, self.object_counter.is_at_end()),
            (name::KEY_ACTOR, self.key_actor.is_at_end()),
            (name::KEY_COUNTER, self.key_counter.lane.is_at_end()),
            (name::KEY_TEXT, self.key_text.is_at_end()),
            (name::INSERT, self.insert.is_at_end()),
            (name::VALUE_TYPE, self.value_type.is_at_end()),
            (name::VALUE, Ok(self.values.is_empty())),
            (name::PREDECESSORS, self.predecessors.is_at_end()),
            (name::PREDECESSOR_ACTOR, self.predecessor_actor.is_at_end()),
            (name::PREDECESSOR_COUNTER, self.predecessor_counter.lane.is_at_end()),
            (name::EXPAND, self.expand.is_at_end()),
            (name::MARK_NAME, self.mark_name.is_at_end()),
        ];
        for (column, ended) in ends {
            if !within(column, ended)? {
                return refuse(column, ColumnProblem::Count);
            }
        }
        // Automerge leaves the column out if nothing expands.
        if !self.expand.is_absent() && !self.any_expands {
            return refuse(name::EXPAND, ColumnProblem::Empty);
        }
        match self.actors.all_used() {
            true => Ok(()),
            false => Err(ChangeError::UnusedActor),
        }
    }

    fn check(&mut self, stretch: Stretch) -> Result<(), ChangeError> {
        self.check_object(stretch)?;
        self.check_key(stretch)?;
        self.check_action()?;
        self.check_values(stretch.rows)?;
        self.check_predecessors(stretch)
    }

    fn check_object(&mut self, stretch: Stretch) -> Result<(), ChangeError> {
        match (self.object_actor.value(), self.object_counter.value()) {
            (None, None) => Ok(()),
            (Some(actor), Some(counter)) => {
                self.actors.check(name::OBJECT_ACTOR, actor)?;
                match (1..stretch.counter).contains(&counter) {
                    true => Ok(()),
                    false => refuse(name::OBJECT_COUNTER, ColumnProblem::Counter),
                }
            }
            _ => refuse(name::OBJECT_COUNTER, ColumnProblem::Value),
        }
    }

    fn check_key(&mut self, stretch: Stretch) -> Result<(), ChangeError> {
        let insert = self.insert.value().ok_or(MISSING_INSERT)?;
        let counters = self.key_counter.span(stretch.rows).map_err(|_| TOO_LARGE_KEY)?;
        match (self.key_actor.value(), counters, self.key_text.value()) {
            (None, None, Some(_)) if !insert => Ok(()),
            (None, Some((0, 0)), None) if insert => Ok(()),
            (Some(actor), Some(counters), None) => {
                self.actors.check(name::KEY_ACTOR, actor)?;
                check_counters(name::KEY_COUNTER, counters, stretch)
            }
            _ => refuse(name::KEY_ACTOR, ColumnProblem::Value),
        }
    }

    fn check_action(&mut self) -> Result<(), ChangeError> {
        let insert = self.insert.value() == Some(true);
        let expand = self.expand.value() == Some(true);
        let named = self.mark_name.value().is_some();
        let plain = !expand && !named;
        let kind = self.value_type.value().map(|value| value & 0b1111);
        let null = kind == Some(value::NULL);
        let fits = match self.action.value() {
            Some(action::MAKE_MAP | action::MAKE_LIST | action::MAKE_TEXT | action::MAKE_TABLE) => {
                plain && null
            }
            Some(action::PUT) => plain,
            Some(action::DELETE) => plain && null && !insert && self.predecessors.value() != Some(0),
            Some(action::INCREMENT) => {
                plain && !insert && matches!(kind, Some(value::UNSIGNED | value::SIGNED))
            }
            // Without a name it ends a mark, which takes no value.
            Some(action::MARK) => insert && (named || null),
            _ => return refuse(name::ACTION, ColumnProblem::Action),
        };
        self.any_expands |= expand;
        match fits {
            true => Ok(()),
            false => refuse(name::ACTION, ColumnProblem::Value),
        }
    }

    /// Uses up the values of `rows` operations.
    fn check_values(&mut self, rows: u64) -> Result<(), ChangeError> {
        let Some(kind) = self.value_type.value() else {
            return refuse(name::VALUE_TYPE, ColumnProblem::Count);
        };
        let bytes = usize::try_from(kind >> 4).unwrap_or(usize::MAX);
        if bytes == 0 {
            return match is_value(kind, &[]) {
                true => Ok(()),
                false => refuse(name::VALUE, ColumnProblem::Value),
            };
        }
        for _ in 0..rows {
            let value = within(name::VALUE, self.values.take("value", bytes))?;
            if !is_value(kind, value) {
                return refuse(name::VALUE, ColumnProblem::Value);
            }
        }
        Ok(())
    }

    fn check_predecessors(&mut self, stretch: Stretch) -> Result<(), ChangeError> {
        let Some(each) = self.predecessors.value() else {
            return refuse(name::PREDECESSORS, ColumnProblem::Count);
        };
        let all = each.saturating_mul(stretch.rows);
        let Some(left) = self.predecessors_left.checked_sub(all) else {
            return refuse(name::PREDECESSORS, ColumnProblem::Count);
        };
        self.predecessors_left = left;
        match each {
            0 => Ok(()),
            1 => self.check_single_predecessors(stretch),
            _ => (0..stretch.rows)
                .try_for_each(|row| self.check_several_predecessors(stretch.counter + row, each)),
        }
    }

    /// How many of the next predecessors differ in counters only, at most `rows`.
    fn next_predecessors(&mut self, rows: u64) -> Result<u64, ChangeError> {
        let actors = within(name::PREDECESSOR_ACTOR, self.predecessor_actor.available())?;
        let counters = within(name::PREDECESSOR_COUNTER, self.predecessor_counter.lane.available())?;
        match actors.min(counters) {
            0 => refuse(name::PREDECESSOR_ACTOR, ColumnProblem::Count),
            available => Ok(available.min(rows)),
        }
    }

    /// The actor and the first and last counter of the next `rows` predecessors, which are stepped over.
    fn take_predecessors(&mut self, rows: u64) -> Result<(u64, (i64, i64)), ChangeError> {
        let counters = self.predecessor_counter.span(rows).map_err(|_| TOO_LARGE_PREDECESSOR)?;
        let (Some(actor), Some(counters)) = (self.predecessor_actor.value(), counters) else {
            return refuse(name::PREDECESSOR_ACTOR, ColumnProblem::Value);
        };
        self.actors.check(name::PREDECESSOR_ACTOR, actor)?;
        self.predecessor_actor.advance(rows);
        self.predecessor_counter.advance(rows);
        Ok((actor, counters))
    }

    fn check_single_predecessors(&mut self, mut stretch: Stretch) -> Result<(), ChangeError> {
        while stretch.rows > 0 {
            let rows = self.next_predecessors(stretch.rows)?;
            let (_, counters) = self.take_predecessors(rows)?;
            check_counters(name::PREDECESSOR_COUNTER, counters, Stretch { rows, ..stretch })?;
            stretch = Stretch { counter: stretch.counter + rows, rows: stretch.rows - rows };
        }
        Ok(())
    }

    /// The predecessors of one operation stand in ascending order of counter, then of actor.
    fn check_several_predecessors(&mut self, counter: u64, each: u64) -> Result<(), ChangeError> {
        let mut before = None;
        for _ in 0..each {
            self.next_predecessors(1)?;
            let (actor, counters) = self.take_predecessors(1)?;
            check_counters(name::PREDECESSOR_COUNTER, counters, Stretch { counter, rows: 1 })?;
            let id = Some((counters.0, self.actors.rank(actor)));
            if before >= id {
                return refuse(name::PREDECESSOR_COUNTER, ColumnProblem::Order);
            }
            before = id;
        }
        Ok(())
    }
}

const MISSING_INSERT: ChangeError =
    ChangeError::Column { column: name::INSERT, problem: ColumnProblem::Count };
const TOO_LARGE_KEY: ChangeError =
    ChangeError::Column { column: name::KEY_COUNTER, problem: ColumnProblem::Counter };
const TOO_LARGE_PREDECESSOR: ChangeError =
    ChangeError::Column { column: name::PREDECESSOR_COUNTER, problem: ColumnProblem::Counter };

/// Each counter is at least 1 and below that of the operation that refers to it. Both rise or fall evenly over the
/// stretch, so its ends decide.
fn check_counters(column: u32, (first, last): (i64, i64), stretch: Stretch) -> Result<(), ChangeError> {
    let own_last = stretch.counter.saturating_add(stretch.rows - 1);
    let is_before = |counter: i64, own: u64| counter >= 1 && counter.unsigned_abs() < own;
    match is_before(first, stretch.counter) && is_before(last, own_last) {
        true => Ok(()),
        false => refuse(column, ColumnProblem::Counter),
    }
}

/// Whether the bytes are a value of this type, as Automerge writes it.
fn is_value(kind: u64, bytes: &[u8]) -> bool {
    let mut reader = Reader::new(bytes);
    let whole = match kind & 0b1111 {
        value::NULL..=value::TRUE => Ok(()),
        value::UNSIGNED => reader.unsigned("value").map(|_| ()),
        value::SIGNED | value::COUNTER | value::TIMESTAMP => reader.signed("value").map(|_| ()),
        value::FLOAT => reader.take("value", 8).map(|_| ()),
        value::TEXT => return std::str::from_utf8(bytes).is_ok(),
        _ => return true,
    };
    whole.is_ok() && reader.is_empty()
}

/// Which of the change's actors are referred to. Index 0 is its own.
struct Actors {
    used: Vec<bool>,
    before_own: u64,
}

impl Actors {
    fn new(context: &Context) -> Self {
        let mut used = vec![false; context.other_actors + 1];
        used[0] = true;
        Self { used, before_own: context.actors_before_own as u64 }
    }

    fn check(&mut self, column: u32, actor: u64) -> Result<(), ChangeError> {
        match usize::try_from(actor).ok().and_then(|actor| self.used.get_mut(actor)) {
            Some(used) => {
                *used = true;
                Ok(())
            }
            None => refuse(column, ColumnProblem::Actor),
        }
    }

    fn all_used(&self) -> bool {
        self.used.iter().all(|used| *used)
    }

    /// Where an actor stands when all of them are sorted. The others are listed in order, without the own.
    fn rank(&self, actor: u64) -> u64 {
        match actor {
            0 => self.before_own,
            other if other <= self.before_own => other - 1,
            other => other,
        }
    }
}
