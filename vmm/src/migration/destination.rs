//! The end that takes in the VM, which runs it once the source has said that it does not.

use std::io;
use std::thread;
use std::time::Duration;

use super::commit::{Destination, DestinationAction, DestinationInput};
use super::incoming::{Broken, Incoming};
use super::local::{self, HandedEstate};
use super::reception::Reception;
use super::record::Record;
use super::source::{Last, Offer};
use super::stream::{ConnectError, Stream};
use super::wire::{self, Kind, MigrationId, Role, WireError};
use crate::control::{ControlError, Order, Resolution, Task};
use crate::machine::Machine;
use crate::machine::device_data::{DeviceDataError, Taking};
use crate::machine::handover::{HandoverError, Inheritance};
use crate::machine::state::{StateError, VERSION};
use crate::vm::RestoreError;

/// How often it is looked whether the wait for something has come to an end.
const TICK: Duration = Duration::from_millis(100);
/// The most of them.
const MAX_CONNECTIONS: u8 = 16;
/// How long a source that has been told that the VM runs here may take to say that it has heard.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why a VM does not come.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    /// Nobody can call here.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Nobody is heard any more.
    #[error("connections cannot be waited for any more")]
    Reception(#[source] io::Error),
    /// The source says why it does not send it.
    #[error("the source gives up: {0}")]
    GivenUp(String),
    /// The way breaks off, or the source does not keep to the protocol.
    #[error("the connection to the source fails")]
    Wire(#[source] WireError),
    /// What the VM is like cannot be understood.
    #[error("the source's description of the VM makes no sense")]
    Document(#[from] serde_json::Error),
    /// It is described in a version that this program does not know.
    #[error(
        "the VM is described in version {0} of the format, and this program reads version {VERSION}"
    )]
    Version(u32),
    /// It is handed over, and cannot be taken over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The VM cannot be here.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A device does not take its state.
    #[error(transparent)]
    Device(#[from] DeviceDataError),
    /// The platform does not take its state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VM cannot be taken over.
    #[error("the VM cannot be run here")]
    Adopt(#[source] ControlError),
    /// The source has changed its mind, or the user has.
    #[error("the VM is not to come any more")]
    Refused,
}

impl From<WireError> for ReceiveError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Refused(reason) => Self::GivenUp(reason),
            error => Self::Wire(error),
        }
    }
}

/// A VM on its way here.
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    reception: &'a Reception,
    record: &'a Record,
    task: &'a Task,
    id: MigrationId,
    control: Stream,
}

impl<'a> Arrival<'a> {
    /// Waits for a VM to be sent.
    pub(crate) fn wait(
        reception: &'a Reception,
        record: &'a Record,
        task: &'a Task,
    ) -> Result<Self, ReceiveError> {
        loop {
            if task.cancel().is_asked() {
                return Err(ReceiveError::Refused);
            }
            let call = reception.next_call(TICK).map_err(ReceiveError::Reception)?;
            let Some(mut call) = call.filter(|call| call.role == Role::Control) else {
                continue;
            };
            record.begin(call.id, task.cancel());
            task.update(|progress| progress.id = Some(call.id.to_string()));
            call.stream.until(task.cancel());
            return Ok(Self {
                reception,
                record,
                task,
                id: call.id,
                control: call.stream,
            });
        }
    }

    /// What the VM is like.
    pub(crate) fn offer(&mut self) -> Result<Offer, ReceiveError> {
        let offer = wire::expect(&mut self.control, Kind::Machine)?;
        let head: Head = serde_json::from_slice(&offer)?;
        match head.machine.version {
            VERSION => {}
            version => return Err(ReceiveError::Version(version)),
        }
        let offer: Offer = serde_json::from_slice(&offer)?;
        if !(1..=MAX_CONNECTIONS).contains(&offer.connections) {
            let what = format!("{} connections for memory", offer.connections);
            return Err(WireError::Unexpected(what).into());
        }
        self.task.update(|progress| {
            progress.memory_bytes = offer.machine.config.memory.size;
        });
        Ok(offer)
    }

    /// What is handed over to this process, if that is said.
    pub(crate) fn inheritance(
        &mut self,
        handed: Option<HandedEstate>,
    ) -> Result<Option<Inheritance>, ReceiveError> {
        let inheritance = handed.map(|handed| local::inheritance(&mut self.control, handed));
        inheritance.transpose()
    }

    /// Takes over the devices of a machine that has been made of its inheritance, and returns the state of the rest.
    pub(crate) fn take_over(&mut self, machine: &Machine) -> Result<Last, ReceiveError> {
        wire::send(&mut self.control, Kind::Ready, &[]).map_err(WireError::from)?;
        self.control.set_patience(None);
        local::take_over(&mut self.control, machine)
    }

    /// Takes in RAM and the devices' own state, over so many connections, and returns the state of the rest. The machine
    /// is made, and its devices run; they stand still afterwards.
    pub(crate) fn take_in(
        &mut self,
        machine: &Machine,
        connections: u8,
    ) -> Result<Last, ReceiveError> {
        wire::send(&mut self.control, Kind::Ready, &[]).map_err(WireError::from)?;
        // The source is silent here while it sends RAM, which takes as long as it takes.
        self.control.set_patience(None);
        let broken = Broken::default();
        let incoming = Incoming {
            id: self.id,
            reception: self.reception,
            task: self.task,
            memory: &machine.memory,
            broken: &broken,
        };
        thread::scope(|scope| {
            // Meanwhile, the source may say that it gives up.
            let ram = scope.spawn(move || incoming.take(connections));
            self.control.until_broken(&broken.0);
            let devices = take_devices(&mut self.control, machine);
            let devices = devices.map_err(|error| broken.by(error));
            let failed = |_| {
                let error = io::Error::other("the thread that receives memory has failed");
                Err(broken.by(WireError::from(error)))
            };
            match (devices, ram.join().unwrap_or_else(failed)) {
                (Err(devices), ram)
                    if devices.is_first
                        || ram.is_ok()
                        || matches!(devices.error, ReceiveError::GivenUp(_)) =>
                {
                    Err(devices.error)
                }
                (_, Err(ram)) => Err(ram.error),
                (devices, Ok(())) => devices.map_err(|failure| failure.error),
            }
        })
    }

    /// Says that everything is here, and waits for the word to run it: true if it comes. If it does not, the copy that is
    /// here is to be ended. As long as nobody knows, this waits.
    pub(crate) fn commit(&mut self) -> bool {
        self.on(DestinationInput::Complete);
        // A source that has gone before it could hear this may have said why.
        let _ = wire::send(&mut self.control, Kind::Prepared, &[]);
        let heard = wire::expect(&mut self.control, Kind::Commit);
        let error = match heard {
            Ok(_) => {
                self.on(DestinationInput::Commit);
                None
            }
            // The source says that it has kept it, or somebody here that it is not wanted.
            Err(WireError::Refused(_)) => {
                self.on(DestinationInput::Failed);
                None
            }
            Err(_) if self.task.cancel().is_asked() => {
                self.on(DestinationInput::Failed);
                None
            }
            Err(error) => {
                self.on(DestinationInput::Lost);
                Some(error)
            }
        };
        if let Some(error) = error.filter(|_| self.state() == Destination::InDoubt) {
            self.task.enter_doubt(ControlError::InDoubt {
                peer: "the source",
                source: error.into(),
            });
        }
        while self.state() == Destination::InDoubt {
            match self.task.next_order(TICK) {
                Order::Wait => {}
                Order::Abandon => self.on(DestinationInput::Failed),
                Order::Resolve(resolution, reply) => {
                    match resolution {
                        Resolution::Run => self.on(DestinationInput::Forced),
                        Resolution::Discard => self.on(DestinationInput::Failed),
                        Resolution::Ask => {
                            let what = "the source asks this VMM, when it is there again; it cannot be asked";
                            reply.send(Err(ControlError::Invalid(what.to_owned())));
                            continue;
                        }
                    }
                    reply.send(Ok(()));
                }
            }
        }
        self.state() == Destination::Running
    }

    /// Says that the VM runs here, and returns whether the source has heard that. If it has not, it is going to ask.
    pub(crate) fn say_committed(&mut self) -> bool {
        self.control.ignore_cancel();
        self.control.set_patience(Some(FAREWELL));
        wire::send(&mut self.control, Kind::Committed, &[])
            .map_err(WireError::from)
            .and_then(|()| wire::expect(&mut self.control, Kind::Heard))
            .is_ok()
    }

    /// The VM does not come. Returns whether the source has nothing to ask: it has never heard that it could.
    pub(crate) fn refuse(&mut self, error: &ReceiveError) -> bool {
        let was = self.state();
        self.on(DestinationInput::Failed);
        self.control.ignore_cancel();
        self.control.set_patience(Some(FAREWELL));
        // The reason's own reason often says more.
        let mut reason = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            reason.push_str(": ");
            reason.push_str(&cause.to_string());
            source = cause.source();
        }
        // Whether this is heard is not known.
        let _ = wire::refuse(&mut self.control, &reason);
        was == Destination::Receiving
    }

    fn on(&self, input: DestinationInput) {
        let _: Option<DestinationAction> = self.record.on(self.id, input);
    }

    fn state(&self) -> Destination {
        self.record.state(self.id).unwrap_or(Destination::Refused)
    }
}

/// As much of an [`Offer`] as all versions have in common.
#[derive(Debug, serde::Deserialize)]
struct Head {
    machine: HeadOfMachine,
}

#[derive(Debug, serde::Deserialize)]
struct HeadOfMachine {
    version: u32,
}

/// Gives the devices their state as it comes, and returns what comes after it.
fn take_devices(control: &mut Stream, machine: &Machine) -> Result<Last, ReceiveError> {
    let devices = machine.pci.devices();
    let taking: Vec<_> = devices
        .iter()
        .map(|device| Taking::begin(device))
        .collect::<Result<_, _>>()?;
    loop {
        let (kind, bytes) = wire::receive(control)?;
        match kind {
            Kind::DeviceData => {
                let split = bytes.split_first_chunk();
                let found = split.and_then(|(number, piece)| {
                    let number = usize::try_from(u32::from_le_bytes(*number)).ok()?;
                    Some((taking.get(number)?, piece))
                });
                let Some((device, piece)) = found else {
                    let what = "the state of a device that there is not".to_owned();
                    return Err(WireError::Unexpected(what).into());
                };
                device.write(piece)?;
            }
            Kind::State => {
                let last: Last = serde_json::from_slice(&bytes)?;
                // Not every server lets its interrupts be set up when the device stands still.
                let restored = machine.pci.restore(&last.state.pci);
                restored.map_err(StateError::from)?;
                for device in taking {
                    device.end()?;
                }
                return Ok(last);
            }
            kind => return Err(WireError::Unexpected(format!("{kind:?} among state")).into()),
        }
    }
}
