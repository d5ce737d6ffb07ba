//! `--restore`.

use super::ConfigError;
use super::devices::option_error;
use crate::control::{DevicePlaces, RestoreRequest, snapshot_directory};
use crate::options::{OptionError, Options};

impl RestoreRequest {
    /// Parses `source_url=file:///PATH,resume=on,prefault=on`. Devices are where they were.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let error = option_error("--restore");
        let keys = &["source_url", "resume", "prefault"];
        let mut options = Options::parse(text, keys).map_err(error)?;
        let key = "source_url";
        let url = options.string(key);
        let url = url.ok_or_else(|| error(OptionError::Missing(key)))?;
        let directory = snapshot_directory(&url).map_err(|_| {
            error(OptionError::Value {
                key,
                value: url,
                expected: "file:///PATH is needed, the path of a snapshot's directory",
            })
        })?;
        Ok(Self {
            directory,
            resume: options.switch("resume").map_err(error)?,
            prefault: options.switch("prefault").map_err(error)?,
            devices: DevicePlaces::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::error::Error as _;

    #[test]
    fn snapshot_is_named_by_its_url() {
        let parsed = RestoreRequest::parse("source_url=file:///a/b,resume=on").unwrap();
        let expected = RestoreRequest {
            directory: "/a/b".into(),
            resume: true,
            prefault: false,
            devices: DevicePlaces::new(),
        };
        assert_eq!(parsed, expected);
        for (wrong, part) in [
            ("resume=on", "source_url"),
            ("source_url=/a", "file:///PATH"),
            ("source_url=file:///a,resume=yes", "on or off"),
            ("source_url=file:///a,memory=1G", "memory"),
        ] {
            let error = RestoreRequest::parse(wrong).unwrap_err();
            assert_eq!(error.to_string(), "--restore");
            let cause = error.source().unwrap().to_string();
            assert!(cause.contains(part), "{cause}");
        }
    }
}
