//! `VERSION`: what both ends can do, and the limits that follow from it.

use std::ffi::CStr;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{ProtocolError, take};

/// Head of the payload of `VERSION`, in both directions. [`Capabilities`] follow as JSON that ends in NUL.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Serialize,
    Deserialize,
)]
#[repr(C)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// Incompatible versions differ in this.
    pub major: u16,
    /// The one who answers names at most the minor version that was proposed.
    pub minor: u16,
}

impl Version {
    /// The version that this crate speaks: what libvfio-user calls itself. (The version of the specification's text
    /// counts something else.)
    pub const CURRENT: Self = Self { major: 0, minor: 2 };

    /// The whole payload of a `VERSION` message.
    ///
    /// # Errors
    ///
    /// None that [`Capabilities`] can cause; the type is that of the JSON library.
    pub fn encode(self, capabilities: &Capabilities) -> Result<Vec<u8>, ProtocolError> {
        let mut payload = self.as_bytes().to_vec();
        serde_json::to_writer(
            &mut payload,
            &Data {
                capabilities: *capabilities,
            },
        )?;
        payload.push(0);
        Ok(payload)
    }

    /// Reads the whole payload of a `VERSION` message. A peer that sends no JSON has said nothing of what it can do.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] if the payload is short, its JSON does not end in NUL, or is not JSON.
    pub fn decode(payload: &[u8]) -> Result<(Self, Capabilities), ProtocolError> {
        let (version, json) = take::<Self>(payload)?;
        if json.is_empty() {
            return Ok((version, Capabilities::default()));
        }
        let json = CStr::from_bytes_until_nul(json).map_err(|_| ProtocolError::Unterminated)?;
        let data: Data = serde_json::from_slice(json.to_bytes())?;
        Ok((version, data.capabilities))
    }

    /// Checks that `answer` is an answer to this proposal.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::Version`] if the major version differs or the minor version is higher.
    pub fn check_answer(self, answer: Self) -> Result<(), ProtocolError> {
        if answer.major == self.major && answer.minor <= self.minor {
            return Ok(());
        }
        Err(ProtocolError::Version {
            major: answer.major,
            minor: answer.minor,
        })
    }
}

/// The JSON of a `VERSION` message.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Data {
    capabilities: Capabilities,
}

/// What one end can do. `None` is a capability that it did not name, which has the specification's default.
///
/// Capabilities that are unknown here are passed over, such as the `migration` that libvfio-user still sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Descriptors that this end takes in one message. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// Largest count of a region or DMA access, in bytes. Default 1048576.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// Most DMA mappings at a time. Default 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes of DMA mappings, each a power of two and all of them in one sum. Default 4096.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Whether `REGION_WRITE_MULTI` is known. Default no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// Whether the device's own commands go over a socket of their own. Default no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
}

/// The twin socket capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinSocket {
    /// In a proposal: whether it is wanted. In an answer: whether there is one.
    pub supported: bool,
    /// In an answer: which of the descriptors sent with it is the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u64>,
}

/// What both ends of a connection can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The version that is spoken.
    pub version: Version,
    /// Descriptors that the peer takes in one message; 0 if it takes none.
    pub max_msg_fds: usize,
    /// Largest count of a region or DMA access, in bytes; at least 8.
    pub max_data_xfer_size: usize,
    /// Most DMA mappings at a time.
    pub max_dma_maps: usize,
    /// Sum of the page sizes of DMA mappings, in bytes.
    pub page_sizes: u64,
    /// Whether `REGION_WRITE_MULTI` is known.
    pub write_multiple: bool,
    /// Which of the descriptors sent with the answer is the twin socket, if there is one.
    pub twin_socket: Option<usize>,
}

impl Limits {
    /// What is left when one end can do `ours` and the other, with the answer or proposal `theirs`, no more than that.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::Capability`] if accesses of 8 bytes, or all page sizes, are ruled out;
    /// [`ProtocolError::TwinSocket`] if a twin socket is announced without its descriptor.
    pub fn agree(
        version: Version,
        ours: &Capabilities,
        theirs: &Capabilities,
    ) -> Result<Self, ProtocolError> {
        let both = |ours: Option<u64>, theirs: Option<u64>, default: u64| {
            ours.unwrap_or(default).min(theirs.unwrap_or(default))
        };
        let max_data_xfer_size = both(
            ours.max_data_xfer_size,
            theirs.max_data_xfer_size,
            DEFAULT_MAX_DATA_XFER_SIZE,
        );
        if max_data_xfer_size < LARGEST_REGISTER {
            return Err(ProtocolError::Capability {
                name: "max_data_xfer_size",
                value: max_data_xfer_size,
            });
        }
        let page_sizes =
            ours.pgsizes.unwrap_or(DEFAULT_PGSIZES) & theirs.pgsizes.unwrap_or(DEFAULT_PGSIZES);
        if page_sizes == 0 {
            return Err(ProtocolError::Capability {
                name: "pgsizes",
                value: theirs.pgsizes.unwrap_or(DEFAULT_PGSIZES),
            });
        }
        Ok(Self {
            version,
            max_msg_fds: to_usize(theirs.max_msg_fds.unwrap_or(DEFAULT_MAX_MSG_FDS))
                .min(SCM_MAX_FD),
            max_data_xfer_size: to_usize(max_data_xfer_size),
            max_dma_maps: to_usize(both(
                ours.max_dma_maps,
                theirs.max_dma_maps,
                DEFAULT_MAX_DMA_MAPS,
            )),
            page_sizes,
            write_multiple: ours.write_multiple == Some(true)
                && theirs.write_multiple == Some(true),
            twin_socket: twin_socket(ours, theirs)?,
        })
    }

    /// Whether [`agree`](Self::agree) could have come to this. To be asked of what somebody else says was agreed on.
    pub fn are_possible(&self) -> bool {
        Version::CURRENT.check_answer(self.version).is_ok()
            && self.max_msg_fds <= SCM_MAX_FD
            && self.max_data_xfer_size as u64 >= LARGEST_REGISTER
            && self.page_sizes != 0
    }
}

/// Which descriptor the twin socket is, if both ends want one.
fn twin_socket(ours: &Capabilities, theirs: &Capabilities) -> Result<Option<usize>, ProtocolError> {
    let wanted = |capabilities: &Capabilities| {
        capabilities
            .twin_socket
            .filter(|twin_socket| twin_socket.supported)
    };
    match (wanted(ours), wanted(theirs)) {
        (Some(_), Some(answer)) => answer
            .fd_index
            .map(|index| Some(to_usize(index)))
            .ok_or(ProtocolError::TwinSocket),
        _ => Ok(None),
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Descriptors that the kernel sends in one message (`SCM_MAX_FD` of its `net/scm.h`).
const SCM_MAX_FD: usize = 253;

/// The widest register access in bytes, which must not be split.
const LARGEST_REGISTER: u64 = 8;

// Defaults of the specification, section "Version".
const DEFAULT_MAX_MSG_FDS: u64 = 1;
const DEFAULT_MAX_DATA_XFER_SIZE: u64 = 1 << 20;
const DEFAULT_MAX_DMA_MAPS: u64 = 65535;
const DEFAULT_PGSIZES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const WANT_TWIN: Capabilities = Capabilities {
        twin_socket: Some(TwinSocket {
            supported: true,
            fd_index: None,
        }),
        max_msg_fds: None,
        max_data_xfer_size: None,
        max_dma_maps: None,
        pgsizes: None,
        write_multiple: None,
    };

    #[test]
    fn version_has_the_layout_of_the_specification() {
        let capabilities = Capabilities {
            max_msg_fds: Some(8),
            ..Capabilities::default()
        };
        let payload = Version::CURRENT.encode(&capabilities).unwrap();
        assert_eq!(
            payload,
            b"\x00\x00\x02\x00{\"capabilities\":{\"max_msg_fds\":8}}\0"
        );
        let decoded = Version::decode(&payload).unwrap();
        assert_eq!(decoded, (Version::CURRENT, capabilities));
    }

    #[test]
    fn the_answer_of_libvfio_user_is_understood() {
        let answer = b"\x00\x00\x02\x00{ \"capabilities\": { \"max_msg_fds\": 8, \
            \"max_data_xfer_size\": 1048576, \"migration\": { \"pgsize\": 4096 }, \
            \"twin_socket\": { \"supported\": true, \"fd_index\": 0 } } }\0";
        let (version, theirs) = Version::decode(answer).unwrap();
        let limits = Limits::agree(version, &WANT_TWIN, &theirs).unwrap();
        let expected = Limits {
            version: Version::CURRENT,
            max_msg_fds: 8,
            max_data_xfer_size: 1 << 20,
            max_dma_maps: 65535,
            page_sizes: 4096,
            write_multiple: false,
            twin_socket: Some(0),
        };
        assert_eq!(limits, expected);
    }

    #[test]
    fn the_smaller_limit_counts() {
        let ours = Capabilities {
            max_msg_fds: Some(16),
            max_data_xfer_size: Some(4096),
            max_dma_maps: Some(1000),
            pgsizes: Some(0x20_1000),
            write_multiple: Some(true),
            ..WANT_TWIN
        };
        let theirs = Capabilities {
            max_msg_fds: Some(1 << 40),
            max_data_xfer_size: Some(1024),
            max_dma_maps: Some(2000),
            pgsizes: Some(0x4020_0000),
            write_multiple: Some(true),
            twin_socket: Some(TwinSocket {
                supported: false,
                fd_index: Some(3),
            }),
        };
        let limits = Limits::agree(Version::CURRENT, &ours, &theirs).unwrap();
        let expected = Limits {
            version: Version::CURRENT,
            max_msg_fds: 253,
            max_data_xfer_size: 1024,
            max_dma_maps: 1000,
            page_sizes: 0x20_0000,
            write_multiple: true,
            twin_socket: None,
        };
        assert_eq!(limits, expected);
    }

    #[test]
    fn what_cannot_have_been_agreed_on_is_told() {
        let possible = Limits::agree(
            Version::CURRENT,
            &Capabilities::default(),
            &Capabilities::default(),
        )
        .unwrap();
        assert!(possible.are_possible());
        let wrong: [fn(&mut Limits); 4] = [
            |limits| limits.version.major = 1,
            |limits| limits.max_msg_fds = 254,
            |limits| limits.max_data_xfer_size = 7,
            |limits| limits.page_sizes = 0,
        ];
        for change in wrong {
            let mut limits = possible;
            change(&mut limits);
            assert!(!limits.are_possible(), "{limits:?}");
        }
    }

    #[test]
    fn no_json_means_the_defaults() {
        let (version, theirs) = Version::decode(&[0, 0, 0, 0]).unwrap();
        assert_eq!(theirs, Capabilities::default());
        let limits = Limits::agree(version, &WANT_TWIN, &theirs).unwrap();
        assert_eq!((limits.max_msg_fds, limits.twin_socket), (1, None));
    }

    #[test]
    fn answers_that_cannot_be_worked_with_are_refused() {
        let answers: [(&str, &[u8]); 8] = [
            ("no version", b"\0\0\0"),
            ("no NUL", b"\0\0\0\0{}"),
            ("no JSON", b"\0\0\0\0{\0"),
            (
                "a negative number",
                b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":-1}}\0",
            ),
            (
                "a string",
                b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"1\"}}\0",
            ),
            (
                "no data",
                b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":7}}\0",
            ),
            (
                "no page size",
                b"\0\0\0\0{\"capabilities\":{\"pgsizes\":65536}}\0",
            ),
            (
                "no descriptor",
                b"\0\0\0\0{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}\0",
            ),
        ];
        for (what, answer) in answers {
            let limits = Version::decode(answer)
                .and_then(|(version, theirs)| Limits::agree(version, &WANT_TWIN, &theirs));
            assert!(limits.is_err(), "{what}");
        }
    }

    #[test]
    fn deep_json_does_not_overflow_the_stack() {
        let mut answer = b"\0\0\0\0".to_vec();
        answer.extend(std::iter::repeat_n(b'[', 100_000));
        answer.push(0);
        assert!(Version::decode(&answer).is_err());
    }

    #[test]
    fn only_versions_up_to_the_proposed_are_answers() {
        let answer = |major, minor| Version::CURRENT.check_answer(Version { major, minor });
        assert!(answer(0, 0).is_ok() && answer(0, 2).is_ok());
        assert!(answer(0, 3).is_err() && answer(1, 0).is_err());
    }
}
