//! Reading and writing packed bytes, for the tail's bundles.

/// Takes the first `count` bytes off; `None` if there are fewer.
pub(crate) fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

/// Appends a number as unsigned LEB128.
pub(crate) fn push_leb128(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Takes a number below 2^63 in unsigned LEB128 off; `None` if there is none.
pub(crate) fn take_leb128(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_length_come_back() {
        for value in [0, 1, 127, 128, 16_383, 16_384, 1 << 40, (1 << 63) - 1] {
            let mut bytes = Vec::new();
            push_leb128(&mut bytes, value);
            bytes.push(9);
            let mut rest = &bytes[..];
            assert_eq!(take_leb128(&mut rest), Some(value));
            assert_eq!(rest, [9]);
        }
    }

    #[test]
    fn numbers_without_an_end_are_refused() {
        assert_eq!(take_leb128(&mut &[0x80][..]), None);
        assert_eq!(take_leb128(&mut &[0xff; 20][..]), None);
    }
}
