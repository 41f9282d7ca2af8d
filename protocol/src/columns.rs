//! Columns: how Automerge stores operations and changes, as runs of equal values.
//!
//! A table is a list of column headers (specification and length) and then the columns' bytes. A specification
//! packs an id, a type in its low three bits and a bit for compression. Integers and texts are run-length encoded:
//! a count and a value repeated that often; a negated count and that many literals; or zero and a count of nulls.
//! Integers may stand for the difference to the value before. Booleans are counts of alternating values, beginning
//! with false. See `columnar/encoding` of automerge 0.12.
//!
//! Two readers are here. [`Lane`] yields runs in the one form that Automerge writes, and refuses any other: Automerge
//! rebuilds changes from their values, so a change in another form would no longer have its hash after a document
//! was saved and loaded. [`count_values`] counts without such demands and without decoding.

use smallvec::SmallVec;

use crate::leb128::{ReadError, ReadProblem, Reader};

/// The bit of a specification that says that the column is compressed.
const DEFLATED: u32 = 0b1000;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ColumnType {
    /// How many values of the following columns of the same id belong to each row.
    Group,
    /// Run-length encoded unsigned integers: actor indexes, plain integers, or types and lengths of values.
    Unsigned,
    Delta,
    Boolean,
    Text,
    /// Bytes whose lengths stand in another column.
    Raw,
}

/// A column's header and bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column<'a> {
    specification: u32,
    pub data: &'a [u8],
}

impl Column<'_> {
    /// The specification without the compression bit: the column's name.
    pub fn name(&self) -> u32 {
        self.specification & !DEFLATED
    }

    pub fn id(&self) -> u32 {
        self.specification >> 4
    }

    pub fn is_deflated(&self) -> bool {
        self.specification & DEFLATED != 0
    }

    pub fn kind(&self) -> ColumnType {
        match self.specification & 0b111 {
            0 => ColumnType::Group,
            1 | 2 | 6 => ColumnType::Unsigned,
            3 => ColumnType::Delta,
            4 => ColumnType::Boolean,
            5 => ColumnType::Text,
            _ => ColumnType::Raw,
        }
    }
}

/// The headers of a table whose bytes come later.
pub(crate) struct Headers(SmallVec<[(u32, usize); 16]>);

impl Headers {
    /// Reads the headers of at most `columns_max` columns.
    pub fn read(reader: &mut Reader<'_>, columns_max: usize) -> Result<Self, ReadError> {
        let count = reader.count("columns", 2, columns_max)?;
        let mut headers = SmallVec::with_capacity(count);
        for _ in 0..count {
            let specification = reader.unsigned_32("column specification")?;
            let length = usize::try_from(reader.unsigned("column length")?).unwrap_or(usize::MAX);
            headers.push((specification, length));
        }
        Ok(Self(headers))
    }

    /// Takes the columns' bytes.
    pub fn columns<'a>(self, reader: &mut Reader<'a>) -> Result<SmallVec<[Column<'a>; 16]>, ReadError> {
        self.0
            .into_iter()
            .map(|(specification, length)| {
                let data = reader.take("column", length)?;
                Ok(Column { specification, data })
            })
            .collect()
    }
}

/// Values that stand next to each other and are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run<V> {
    pub count: u64,
    /// `None` for nulls.
    pub value: Option<V>,
}

/// The runs of a column.
pub(crate) trait Runs {
    type Value: Copy;

    /// The next run, or `None` at the end of the column.
    fn next_run(&mut self) -> Result<Option<Run<Self::Value>>, ReadError>;
}

/// A value that can be run-length encoded.
pub(crate) trait RunValue<'a>: Copy + PartialEq {
    fn read(reader: &mut Reader<'a>) -> Result<Self, ReadError>;
}

impl<'a> RunValue<'a> for u64 {
    fn read(reader: &mut Reader<'a>) -> Result<Self, ReadError> {
        reader.unsigned("value")
    }
}

impl<'a> RunValue<'a> for i64 {
    fn read(reader: &mut Reader<'a>) -> Result<Self, ReadError> {
        reader.signed("difference")
    }
}

impl<'a> RunValue<'a> for &'a str {
    fn read(reader: &mut Reader<'a>) -> Result<Self, ReadError> {
        let error = reader.error("text", ReadProblem::Malformed);
        std::str::from_utf8(reader.length_prefixed("text")?).map_err(|_| error)
    }
}

/// What stood before the run that is to be read.
#[derive(Clone, Copy, PartialEq)]
enum Previous<V> {
    Nothing,
    /// Nulls from the beginning of the column: if nothing follows, the column should not be there.
    FirstNulls,
    Nulls,
    Repeat(V),
    Literal(V),
}

/// A run-length encoded column in canonical form: neighbouring runs differ, a repeated value is never written as
/// literals, and a column of nulls alone is left out.
pub(crate) struct ValueRuns<'a, V> {
    reader: Reader<'a>,
    literals_left: u64,
    previous: Previous<V>,
}

impl<'a, V: RunValue<'a>> ValueRuns<'a, V> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { reader: Reader::new(data), literals_left: 0, previous: Previous::Nothing }
    }

    fn malformed<T>(&self) -> Result<T, ReadError> {
        Err(self.reader.error("run", ReadProblem::Malformed))
    }

    fn literal(&mut self) -> Result<Run<V>, ReadError> {
        let value = V::read(&mut self.reader)?;
        if let Previous::Literal(before) | Previous::Repeat(before) = self.previous
            && before == value
        {
            return self.malformed();
        }
        self.literals_left -= 1;
        self.previous = Previous::Literal(value);
        Ok(Run { count: 1, value: Some(value) })
    }

    fn repeat(&mut self, count: u64) -> Result<Run<V>, ReadError> {
        let value = V::read(&mut self.reader)?;
        let repeats = match self.previous {
            Previous::Literal(before) | Previous::Repeat(before) => before == value,
            _ => false,
        };
        if count < 2 || repeats {
            return self.malformed();
        }
        self.previous = Previous::Repeat(value);
        Ok(Run { count, value: Some(value) })
    }

    fn nulls(&mut self) -> Result<Run<V>, ReadError> {
        let count = self.reader.unsigned("nulls")?;
        self.previous = match self.previous {
            Previous::Nothing => Previous::FirstNulls,
            Previous::FirstNulls | Previous::Nulls => return self.malformed(),
            Previous::Repeat(_) | Previous::Literal(_) => Previous::Nulls,
        };
        match count {
            0 => self.malformed(),
            _ => Ok(Run { count, value: None }),
        }
    }
}

impl<'a, V: RunValue<'a>> Runs for ValueRuns<'a, V> {
    type Value = V;

    fn next_run(&mut self) -> Result<Option<Run<V>>, ReadError> {
        if self.literals_left > 0 {
            return self.literal().map(Some);
        }
        if self.reader.is_empty() {
            return match self.previous {
                Previous::FirstNulls => self.malformed(),
                _ => Ok(None),
            };
        }
        let header = self.reader.signed("run")?;
        match header {
            0 => self.nulls(),
            1.. => self.repeat(header.unsigned_abs()),
            _ if matches!(self.previous, Previous::Literal(_)) => self.malformed(),
            _ => {
                self.literals_left = header.unsigned_abs();
                self.literal()
            }
        }
        .map(Some)
    }
}

/// A column of booleans in canonical form: no count is zero, save the first if the column begins with true.
pub(crate) struct BooleanRuns<'a> {
    reader: Reader<'a>,
    next: bool,
}

impl<'a> BooleanRuns<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { reader: Reader::new(data), next: false }
    }
}

impl Runs for BooleanRuns<'_> {
    type Value = bool;

    fn next_run(&mut self) -> Result<Option<Run<bool>>, ReadError> {
        if self.reader.is_empty() {
            return Ok(None);
        }
        let begins = self.reader.position() == 0;
        let mut count = self.reader.unsigned("run")?;
        if count == 0 && begins {
            self.next = true;
            count = self.reader.unsigned("run")?;
        }
        if count == 0 {
            return Err(self.reader.error("run", ReadProblem::Malformed));
        }
        let value = self.next;
        self.next = !value;
        Ok(Some(Run { count, value: Some(value) }))
    }
}

/// A column that is walked in step with others.
pub(crate) struct Lane<R: Runs> {
    /// `None` if the column is left out, which stands for nulls without end.
    runs: Option<R>,
    current: Run<R::Value>,
}

impl<R: Runs> Lane<R> {
    pub fn new(runs: R) -> Self {
        Self { runs: Some(runs), current: Run { count: 0, value: None } }
    }

    /// A column that is not there.
    pub fn absent() -> Self {
        Self { runs: None, current: Run { count: u64::MAX, value: None } }
    }

    pub fn is_absent(&self) -> bool {
        self.runs.is_none()
    }

    /// How many more rows have the present value; zero at the end of the column.
    pub fn available(&mut self) -> Result<u64, ReadError> {
        if self.current.count == 0
            && let Some(runs) = &mut self.runs
            && let Some(run) = runs.next_run()?
        {
            self.current = run;
        }
        Ok(self.current.count)
    }

    /// The value of the present row; only meaningful while rows are available.
    pub fn value(&self) -> Option<R::Value> {
        self.current.value
    }

    /// Steps over rows, at most as many as are available.
    pub fn advance(&mut self, rows: u64) {
        if self.runs.is_some() {
            self.current.count = self.current.count.saturating_sub(rows);
        }
    }

    /// Whether the column has ended, or was never there.
    pub fn is_at_end(&mut self) -> Result<bool, ReadError> {
        Ok(self.is_absent() || self.available()? == 0)
    }
}

/// A lane of differences, with the sum so far.
pub(crate) struct DeltaLane<'a> {
    pub lane: Lane<ValueRuns<'a, i64>>,
    sum: i64,
}

impl<'a> DeltaLane<'a> {
    pub fn new(lane: Lane<ValueRuns<'a, i64>>) -> Self {
        Self { lane, sum: 0 }
    }

    /// The absolute values of the first and the last of the next `rows` rows, between which they rise or fall
    /// evenly. `Ok(None)` for nulls. The error is a sum beyond 63 bits.
    pub fn span(&self, rows: u64) -> Result<Option<(i64, i64)>, ReadProblem> {
        let Some(step) = self.lane.value() else { return Ok(None) };
        let first = self.sum.checked_add(step);
        let last = i64::try_from(rows)
            .ok()
            .and_then(|rows| step.checked_mul(rows))
            .and_then(|rise| self.sum.checked_add(rise));
        first.zip(last).map(Some).ok_or(ReadProblem::TooLarge)
    }

    pub fn advance(&mut self, rows: u64) {
        if let Ok(Some((_, last))) = self.span(rows) {
            self.sum = last;
        }
        self.lane.advance(rows);
    }
}

/// How many values a column holds, counted from its runs' headers. At most `count_max` are allowed.
pub(crate) fn count_values(column: &Column<'_>, data: &[u8], count_max: u64) -> Result<u64, ReadError> {
    let mut reader = Reader::new(data);
    let mut total = 0_u64;
    while !reader.is_empty() {
        let at = reader.position();
        let count = match column.kind() {
            ColumnType::Boolean => reader.unsigned("run")?,
            kind => skip_run(&mut reader, kind)?,
        };
        total = total.saturating_add(count);
        if total > count_max {
            return Err(ReadError { field: "run", at, problem: ReadProblem::TooLarge });
        }
    }
    Ok(total)
}

fn skip_run(reader: &mut Reader<'_>, kind: ColumnType) -> Result<u64, ReadError> {
    let header = reader.signed("run")?;
    if header == 0 {
        return reader.unsigned("nulls");
    }
    let values = if header > 0 { 1 } else { header.unsigned_abs() };
    for _ in 0..values {
        match kind {
            ColumnType::Delta => reader.signed("difference").map(|_| ())?,
            ColumnType::Text => reader.length_prefixed("text").map(|_| ())?,
            _ => reader.unsigned("value").map(|_| ())?,
        }
    }
    Ok(header.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Listed<V> = Vec<(u64, Option<V>)>;

    fn runs<R: Runs>(mut runs: R) -> Result<Listed<R::Value>, ReadError> {
        let mut all = Vec::new();
        while let Some(run) = runs.next_run()? {
            all.push((run.count, run.value));
        }
        Ok(all)
    }

    #[test]
    fn repetitions_literals_and_nulls_are_runs() {
        let column = [3, 7, 0x7e, 8, 9, 0, 4, 2, 9];
        let expected = [(3, Some(7)), (1, Some(8)), (1, Some(9)), (4, None), (2, Some(9))];
        assert_eq!(runs(ValueRuns::<u64>::new(&column)).unwrap(), expected);
        let texts = [2, 1, b'a', 0x7f, 0];
        assert_eq!(runs(ValueRuns::<&str>::new(&texts)).unwrap(), [(2, Some("a")), (1, Some(""))]);
    }

    #[test]
    fn only_the_canonical_form_is_read() {
        for column in [
            &[3, 7, 2, 7][..],
            &[3, 7, 0x7f, 7],
            &[0x7f, 7, 2, 7],
            &[0x7f, 7, 0x7f, 8],
            &[0x7e, 7, 7],
            &[1, 7],
            &[0, 2],
            &[0, 2, 0, 2, 2, 7],
            &[0, 0, 2, 7],
            &[2],
            &[0x7e, 7],
        ] {
            assert!(runs(ValueRuns::<u64>::new(column)).is_err(), "{column:?}");
        }
        assert!(runs(ValueRuns::<&str>::new(&[2, 1, 0xff])).is_err());
    }

    #[test]
    fn booleans_alternate_from_false() {
        assert_eq!(runs(BooleanRuns::new(&[2, 3])).unwrap(), [(2, Some(false)), (3, Some(true))]);
        assert_eq!(runs(BooleanRuns::new(&[0, 3, 1])).unwrap(), [(3, Some(true)), (1, Some(false))]);
        for column in [&[0][..], &[0, 0], &[2, 0], &[2, 0, 1]] {
            assert!(runs(BooleanRuns::new(column)).is_err(), "{column:?}");
        }
    }

    #[test]
    fn a_delta_lane_sums_its_steps_and_refuses_to_overflow() {
        let mut lane = DeltaLane::new(Lane::new(ValueRuns::new(&[3, 5, 0, 2, 0x7f, 0x7e])));
        assert_eq!(lane.lane.available(), Ok(3));
        assert_eq!(lane.span(3), Ok(Some((5, 15))));
        lane.advance(2);
        assert_eq!(lane.span(1), Ok(Some((15, 15))));
        lane.advance(1);
        assert_eq!(lane.lane.available(), Ok(2));
        assert_eq!(lane.span(2), Ok(None));
        lane.advance(2);
        assert_eq!(lane.lane.available(), Ok(1));
        assert_eq!(lane.span(1), Ok(Some((13, 13))));
        lane.advance(1);
        assert_eq!(lane.lane.is_at_end(), Ok(true));
        let steep = [0x82, 0x01, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f];
        let mut lane = DeltaLane::new(Lane::new(ValueRuns::new(&steep)));
        assert_eq!(lane.lane.available(), Ok(130));
        assert_eq!(lane.span(130), Err(ReadProblem::TooLarge));
    }

    #[test]
    fn an_absent_lane_is_null_for_ever_and_at_its_end() {
        let mut lane = Lane::<ValueRuns<'_, u64>>::absent();
        lane.advance(u64::MAX);
        assert_eq!((lane.available(), lane.value(), lane.is_at_end()), (Ok(u64::MAX), None, Ok(true)));
    }
}
