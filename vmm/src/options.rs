//! Options of the form `key=value,key=value` that several flags take.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

/// Why an option cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A part without a `=`.
    #[error("`{0}` is not of the form key=value")]
    NotKeyValue(String),
    /// A key that the flag does not have.
    #[error("unknown key `{key}`; there {}", list(.known))]
    UnknownKey {
        /// The key.
        key: String,
        /// Those that there are.
        known: &'static [&'static str],
    },
    /// A key that was given twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// A key that is needed.
    #[error("`{0}=` is missing")]
    Missing(&'static str),
    /// A value that makes no sense.
    #[error("`{key}={value}`: {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What it can be set to.
        expected: &'static str,
    },
}

fn list(keys: &[&str]) -> String {
    match keys {
        [key] => format!("is only `{key}`"),
        keys => format!("are {}", keys.join(", ")),
    }
}

/// The values of an option's keys.
#[derive(Debug, Default)]
pub(crate) struct Options(BTreeMap<&'static str, String>);

impl Options {
    /// Takes an option with these keys apart.
    pub(crate) fn parse(text: &str, keys: &'static [&'static str]) -> Result<Self, OptionError> {
        let mut values = BTreeMap::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| OptionError::NotKeyValue(part.to_owned()))?;
            let known = keys.iter().find(|known| **known == key).ok_or_else(|| {
                OptionError::UnknownKey {
                    key: key.to_owned(),
                    known: keys,
                }
            })?;
            if values.insert(*known, value.to_owned()).is_some() {
                return Err(OptionError::Twice(key.to_owned()));
            }
        }
        Ok(Self(values))
    }

    /// A string, if it is given.
    pub(crate) fn string(&mut self, key: &'static str) -> Option<String> {
        self.0.remove(key)
    }

    /// A path, if it is given.
    pub(crate) fn path(&mut self, key: &'static str) -> Result<Option<PathBuf>, OptionError> {
        let Some(value) = self.0.remove(key) else {
            return Ok(None);
        };
        if value.is_empty() {
            return Err(OptionError::Value {
                key,
                value,
                expected: "a path is needed",
            });
        }
        Ok(Some(value.into()))
    }

    /// `on` or `off`; off if it is not given.
    pub(crate) fn switch(&mut self, key: &'static str) -> Result<bool, OptionError> {
        Ok(self.given_switch(key)?.unwrap_or(false))
    }

    /// `on` or `off`, if it is given.
    pub(crate) fn given_switch(&mut self, key: &'static str) -> Result<Option<bool>, OptionError> {
        match self.0.remove(key).as_deref() {
            None => Ok(None),
            Some("off") => Ok(Some(false)),
            Some("on") => Ok(Some(true)),
            Some(value) => {
                let value = value.to_owned();
                Err(OptionError::Value {
                    key,
                    value,
                    expected: "it is either on or off",
                })
            }
        }
    }

    /// A number that a `T` has room for, if it is given.
    pub(crate) fn number<T: FromStr>(
        &mut self,
        key: &'static str,
    ) -> Result<Option<T>, OptionError> {
        let parse = |value: String| {
            let expected = "a whole number is needed, and not so large a one";
            value.parse().map_err(|_| OptionError::Value {
                key,
                value,
                expected,
            })
        };
        self.0.remove(key).map(parse).transpose()
    }

    /// A size in bytes, if it is given.
    pub(crate) fn size(&mut self, key: &'static str) -> Result<Option<u64>, OptionError> {
        let parse = |value: String| {
            let expected =
                "a number of bytes is needed, or of KiB, MiB, GiB or TiB as in 512K, 512M, 4G, 1T";
            parse_size(&value).ok_or(OptionError::Value {
                key,
                value,
                expected,
            })
        };
        self.0.remove(key).map(parse).transpose()
    }
}

/// A number of bytes with an optional suffix.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (end, 'K' | 'k') => (text.get(..end)?, 10),
        (end, 'M' | 'm') => (text.get(..end)?, 20),
        (end, 'G' | 'g') => (text.get(..end)?, 30),
        (end, 'T' | 't') => (text.get(..end)?, 40),
        _ => (text, 0),
    };
    // `parse` would also take a sign.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &[&str] = &["size", "shared", "path", "count"];

    #[test]
    fn values_are_found_by_their_keys() {
        let mut options = Options::parse("size=512M,shared=on,path=/a=b,count=3", KEYS).unwrap();
        assert_eq!(options.size("size"), Ok(Some(512 << 20)));
        assert_eq!(options.switch("shared"), Ok(true));
        assert_eq!(options.path("path"), Ok(Some("/a=b".into())));
        assert_eq!(options.number("count"), Ok(Some(3_u32)));
        assert_eq!(options.size("size"), Ok(None));
        assert_eq!(options.switch("shared"), Ok(false));
    }

    #[test]
    fn sizes_have_suffixes() {
        for (text, size) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1K", Some(1 << 10)),
            ("2m", Some(2 << 20)),
            ("3G", Some(3 << 30)),
            ("1T", Some(1 << 40)),
            ("", None),
            ("G", None),
            ("+1G", None),
            ("-1", None),
            ("1.5G", None),
            ("1GiB", None),
            ("1Ö", None),
            ("99999999999T", None),
        ] {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text| Options::parse(text, KEYS).unwrap_err().to_string();
        assert_eq!(
            error("sise=1G"),
            "unknown key `sise`; there are size, shared, path, count"
        );
        assert_eq!(error("1G"), "`1G` is not of the form key=value");
        assert_eq!(error("size=1G,"), "`` is not of the form key=value");
        assert_eq!(error("size=1G,size=2G"), "`size` is given twice");
        let mut options = Options::parse("size=x,shared=yes,path=,count=-1", KEYS).unwrap();
        assert!(options.size("size").is_err());
        assert!(options.switch("shared").is_err());
        assert!(options.path("path").is_err());
        assert!(options.number::<u32>("count").is_err());
    }
}
