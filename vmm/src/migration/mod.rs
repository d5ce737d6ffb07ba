//! The move of a running VM to another process: over a network, or to another VMM of the same host.
//!
//! The [`source`] sends, the [`destination`] takes in what comes to its [`reception`]. [`commit`] is how they agree on which
//! of them runs the VM, [`wire`] what they say to each other and [`stream`] over what, [`ram`] how guest memory goes over,
//! and [`policy`] when the source stops its VM. A VM that stays on its host is handed over as it is ([`local`]). The
//! operations of the control API are what calls this.

mod brake;
mod commit;
mod destination;
mod device_logs;
mod gather;
mod incoming;
mod lanes;
mod local;
mod policy;
mod precopy;
mod ram;
mod reception;
mod record;
pub(crate) mod source;
mod stream;
mod tls;
mod wire;

pub(crate) use self::destination::{Arrival, ReceiveError};
#[cfg(any(test, fuzzing))]
pub(crate) use self::ram::overhear;
pub(crate) use self::reception::Reception;
pub(crate) use self::record::Record;
pub(crate) use self::source::Departed;
