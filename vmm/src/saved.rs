//! How saved state is written down, and what is checked of it when it comes back.
//!
//! Saved state may come from a file or a peer, so it is hostile until it has been parsed: KVM's structures have exactly
//! their size, and a list has no more elements than there can be. KVM's structures are saved as their bytes, which the
//! kernel's interface fixes for all time, in hexadecimal.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use data_encoding::HEXLOWER;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A structure of KVM's.
#[derive(Clone, Copy)]
pub(crate) struct Raw<T>(pub(crate) T);

impl<T> Deref for Raw<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: IntoBytes + Immutable> PartialEq for Raw<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T: IntoBytes + Immutable> fmt::Debug for Raw<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(self.0.as_bytes()))
    }
}

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let size = size_of::<T>();
        let bytes = deserializer.deserialize_str(HexVisitor { max: size })?;
        match T::read_from_bytes(&bytes) {
            Ok(value) => Ok(Self(value)),
            Err(_) => Err(Error::invalid_length(
                bytes.len(),
                &HexVisitor { max: size },
            )),
        }
    }
}

/// Bytes of a number that only KVM knows, but no more than `MAX`.
#[derive(Clone, PartialEq)]
pub(crate) struct RawBytes<const MAX: usize>(Vec<u8>);

impl<const MAX: usize> RawBytes<MAX> {
    /// None of more than `MAX`.
    pub(crate) fn new(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() <= MAX).then_some(Self(bytes))
    }
}

impl<const MAX: usize> Deref for RawBytes<MAX> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl<const MAX: usize> fmt::Debug for RawBytes<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl<const MAX: usize> Serialize for RawBytes<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(&self.0))
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for RawBytes<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_str(HexVisitor { max: MAX })
            .map(Self)
    }
}

/// A list of no more than `MAX` elements.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct List<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const MAX: usize> List<T, MAX> {
    /// None of more than `MAX`.
    pub(crate) fn new(elements: Vec<T>) -> Option<Self> {
        (elements.len() <= MAX).then_some(Self(elements))
    }
}

impl<T, const MAX: usize> Deref for List<T, MAX> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Serialize, const MAX: usize> Serialize for List<T, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T, const MAX: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for ListVisitor<T, MAX> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of {MAX} elements at most")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = sequence.next_element()? {
                    if elements.len() == MAX {
                        return Err(Error::invalid_length(MAX + 1, &self));
                    }
                    elements.push(element);
                }
                Ok(elements)
            }
        }

        deserializer
            .deserialize_seq(ListVisitor::<T, MAX>(PhantomData))
            .map(Self)
    }
}

/// Takes hexadecimal digits for bytes.
struct HexVisitor {
    max: usize,
}

impl Visitor<'_> for HexVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in hexadecimal", self.max)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
        if text.len().div_ceil(2) > self.max {
            return Err(E::invalid_length(text.len().div_ceil(2), &self));
        }
        HEXLOWER
            .decode(text.as_bytes())
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Other("other text"), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..=64)) {
            let saved = RawBytes::<64>::new(bytes).unwrap();
            let text = serde_json::to_string(&saved).unwrap();
            prop_assert_eq!(parse::<RawBytes<64>>(&text).unwrap(), saved);
        }

        #[test]
        fn structures_come_back(value in any::<[u32; 5]>()) {
            let text = serde_json::to_string(&Raw(value)).unwrap();
            prop_assert_eq!(parse::<Raw<[u32; 5]>>(&text).unwrap(), Raw(value));
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let text = serde_json::to_string(&text).unwrap();
            let _ = parse::<Raw<u32>>(&text);
        }
    }

    #[test]
    fn structures_have_their_size() {
        assert_eq!(parse(r#""78563412""#), Ok(Raw(0x1234_5678_u32)));
        for wrong in [
            "",
            "785634",
            "7856341",
            "7856341200",
            "7856341g",
            "+8563412",
        ] {
            let error = parse::<Raw<u32>>(&format!("{wrong:?}")).unwrap_err();
            assert!(error.contains("expected 4 bytes in hexadecimal"), "{error}");
        }
    }

    #[test]
    fn lists_have_an_end() {
        assert_eq!(parse("[1,2]"), Ok(List::<u8, 2>(vec![1, 2])));
        let error = parse::<List<u8, 2>>("[1,2,3]").unwrap_err();
        assert!(
            error.contains("expected a list of 2 elements at most"),
            "{error}"
        );
        assert_eq!(List::<u8, 2>::new(vec![0; 3]), None);
    }
}
