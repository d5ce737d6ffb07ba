//! What the guest sees: the passthrough endpoint over its backends, and the few platform devices.

pub mod host;
pub mod kernel;
pub mod power;

mod backend;
mod bus;
mod dma;
mod handover;
mod i8042;
mod interrupts;
mod migration;
mod passthrough;
mod remote;
mod serial;

pub use backend::{
    Backend, BackendError, Doorbell, Irq, IrqInfo, MappableArea, MessageControl, Region, RegionInfo,
};
pub use bus::BusDevice;
pub use dma::{DmaTarget, Mapping};
pub use handover::{Handover, RemoteState};
pub use i8042::I8042;
pub use interrupts::{EventVectors, InterruptLine, InterruptSource, LineEvents};
pub use migration::{Chunk, Fallback, Left, Migration, Next, TransitionError, transition};
pub use passthrough::{
    Attachment, BarFingerprint, BarLayout, ConfigState, Difference, DoorbellFingerprint,
    EndpointState, Fingerprint, Mismatch, Passthrough, Probe, ProbeError, RestoreError,
    RungDoorbell, SaveError,
};
pub use remote::Remote;
pub use serial::{Serial, SerialError, SerialState};
pub use vfio_user_client::{Descriptors, DeviceState, MigrationFlags, Standing};
