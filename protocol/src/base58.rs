//! Base58 with a checksum: the text form of document ids and heads.
//!
//! The bytes and the first four of their double SHA-256, as a number in base 58 whose leading zero bytes are written
//! as leading `1`s. A document id stands in every frame, so this works on five digits and 32 bits at a time, which
//! for an id of 16 bytes is several times faster than byte by byte.

use sha2::{Digest, Sha256};
use smallvec::SmallVec;

const ALPHABET: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

/// Not a digit.
const NONE: u8 = 0xff;

/// The value of each digit.
const VALUES: [u8; 256] = {
    let mut values = [NONE; 256];
    let mut value = 0;
    while value < ALPHABET.len() {
        values[ALPHABET[value] as usize] = value as u8;
        value += 1;
    }
    values
};

/// How many digits are taken at a time; 58 to this power fits 32 bits.
const GROUP: usize = 5;
const GROUP_VALUE: u64 = 58_u64.pow(GROUP as u32);

const CHECKSUM_BYTES: usize = 4;

/// The bytes that a text stands for, without their checksum; `None` if it is no base58 or the checksum is wrong.
///
/// The work is quadratic in the length of the text, which the caller bounds.
pub(crate) fn decode_check(text: &str) -> Option<SmallVec<[u8; 40]>> {
    let digits = text.as_bytes();
    let zeros = digits.iter().take_while(|digit| **digit == ALPHABET[0]).count();
    let limbs = limbs_of(&digits[zeros..])?;
    let mut bytes: SmallVec<[u8; 40]> = SmallVec::from_elem(0, zeros);
    let number = limbs.iter().rev().flat_map(|limb| limb.to_be_bytes());
    bytes.extend(number.skip_while(|byte| *byte == 0));
    let length = bytes.len().checked_sub(CHECKSUM_BYTES)?;
    if checksum(&bytes[..length]) != bytes[length..] {
        return None;
    }
    bytes.truncate(length);
    Some(bytes)
}

/// A number in base 58 as limbs of 32 bits, the lowest first.
fn limbs_of(digits: &[u8]) -> Option<SmallVec<[u32; 16]>> {
    let mut limbs: SmallVec<[u32; 16]> = SmallVec::new();
    let (head, groups) = digits.split_at(digits.len() % GROUP);
    for group in std::iter::once(head).chain(groups.chunks_exact(GROUP)) {
        let (mut carry, mut scale) = (0_u64, 1_u64);
        for digit in group {
            let value = VALUES[usize::from(*digit)];
            if value == NONE {
                return None;
            }
            carry = carry * 58 + u64::from(value);
            scale *= 58;
        }
        for limb in &mut limbs {
            carry += u64::from(*limb) * scale;
            *limb = carry as u32;
            carry >>= 32;
        }
        if carry > 0 {
            limbs.push(carry as u32);
        }
    }
    Some(limbs)
}

/// The text form of bytes.
pub(crate) fn encode_check(bytes: &[u8]) -> String {
    let mut checked: SmallVec<[u8; 72]> = SmallVec::from_slice(bytes);
    checked.extend_from_slice(&checksum(bytes));
    let zeros = checked.iter().take_while(|byte| **byte == 0).count();
    let groups = checked[zeros..].rchunks(4);
    let limb = |group: &[u8]| group.iter().fold(0, |limb, byte| limb << 8 | u32::from(*byte));
    let mut limbs: SmallVec<[u32; 20]> = groups.map(limb).collect();
    let mut text = Vec::with_capacity(zeros + 2 * checked.len());
    while let Some(mut group) = divide(&mut limbs) {
        for _ in 0..GROUP {
            text.push(ALPHABET[(group % 58) as usize]);
            group /= 58;
        }
    }
    // The highest group is filled up with zeros, which are no digits of the number.
    while text.last() == Some(&ALPHABET[0]) {
        text.pop();
    }
    text.resize(text.len() + zeros, ALPHABET[0]);
    text.reverse();
    String::from_utf8(text).expect("the digits are ASCII")
}

/// Divides by the value of a group of digits and returns the remainder; `None` once nothing is left.
fn divide(limbs: &mut SmallVec<[u32; 20]>) -> Option<u64> {
    while limbs.last() == Some(&0) {
        limbs.pop();
    }
    if limbs.is_empty() {
        return None;
    }
    let mut remainder = 0;
    for limb in limbs.iter_mut().rev() {
        let value = remainder << 32 | u64::from(*limb);
        *limb = (value / GROUP_VALUE) as u32;
        remainder = value % GROUP_VALUE;
    }
    Some(remainder)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = Sha256::digest(Sha256::digest(bytes));
    [hash[0], hash[1], hash[2], hash[3]]
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ecosystems_example_is_read_and_written() {
        let bytes = 0xf1c2_9c84_74c8_4ade_b800_be47_627d_33bf_u128.to_be_bytes();
        let text = "4NMNnkMhL8jXrdJ9jamS58PAVdXu";
        assert_eq!(decode_check(text).as_deref(), Some(&bytes[..]));
        assert_eq!(encode_check(&bytes), text);
    }

    #[test]
    fn what_is_no_base58_is_refused() {
        for text in
            ["", "1", "1111", "0", "4NMNnkMhL8jXrdJ9jamS58PAVdXv", "4NMNnkMhL8jXrdJ9jamS58PAVdX ", "é"]
        {
            assert_eq!(decode_check(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn texts_are_those_of_the_reference(zeros in 0_usize..5, tail in vec(any::<u8>(), 0..80)) {
            let bytes = [vec![0; zeros], tail].concat();
            let reference = bs58::encode(&bytes).with_check().into_string();
            prop_assert_eq!(encode_check(&bytes), reference.clone());
            prop_assert_eq!(decode_check(&reference).map(|found| found.to_vec()), Some(bytes));
        }

        #[test]
        fn damaged_texts_are_judged_as_the_reference_judges_them(text in "[1-9A-HJ-NP-Za-km-zIl0]{0,60}") {
            let reference = bs58::decode(&text).with_check(None).into_vec().ok();
            prop_assert_eq!(decode_check(&text).map(|found| found.to_vec()), reference);
        }
    }
}
