//! The end that has the VM: it sends it, and keeps it unless the other end has it.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::commit::{Source, SourceInput};
use super::lanes::{Lanes, Load};
use super::local::{self, HandedDevices, HandedEstate};
use super::precopy::{self, Early, Tracking, microseconds};
use super::stream::{ConnectError, PATIENCE, Route, Stream};
use super::wire::{self, Kind, MigrationId, Role, WireError};
use crate::control::{ControlError, MigrationUrl, Order, Phase, Resolution, SendRequest, Task};
use crate::machine::device_data::{self, DeviceDataError};
use crate::machine::handover::HandoverError;
use crate::machine::state::{Description, MachineState, StateError};
use crate::machine::{FreezeError, Frozen, Machine};
use crate::memory::written::Pages;
use crate::slots::DirtyLogError;
use crate::vcpus::RunState;

/// How long vCPUs may take to stand still: longer than the longest access to a device.
const PAUSE: Duration = Duration::from_secs(30);
/// How often a destination is asked how a migration ended.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a destination that is told that the VM does not come may take to hear that.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long it may take to answer that.
const ANSWER: Duration = Duration::from_secs(5);

/// Why a VM does not move. It is as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// There is no way to the destination.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The destination says why it does not want it.
    #[error("the destination does not take it: {0}")]
    Refused(String),
    /// The way breaks off.
    #[error("the connection to the destination fails")]
    Wire(#[source] WireError),
    /// It is to be handed over, and the destination is elsewhere, or so it seems.
    #[error("{0}: a VM is handed over (local) on one host, by a Unix socket: give unix:PATH")]
    NotLocal(MigrationUrl),
    /// It cannot be handed over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The way breaks off when the destination has everything.
    #[error("the connection to the destination fails before it is ready")]
    Unprepared(#[source] WireError),
    /// The guest's writes cannot be followed.
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    /// The VM does not stand still.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// A vCPU does not stand still.
    #[error("a vCPU does not come back from the guest or from a device")]
    Pause,
    /// The state of the platform cannot be had.
    #[error(transparent)]
    State(#[from] StateError),
    /// The state of the platform cannot be told.
    #[error("its state cannot be written down")]
    Document(#[from] serde_json::Error),
    /// The state of a device cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceDataError),
    /// RAM cannot be sent.
    #[error("its memory cannot be sent")]
    Memory(#[source] WireError),
    /// It takes longer than it may.
    #[error(
        "the guest writes to memory faster than it can be sent, and the time is over: give it more (downtime_ms, \
         timeout_s, connections), or have it stand still for as long as it takes (timeout_strategy)"
    )]
    TooLong,
    /// It would stand still for longer than it may.
    #[error(
        "{devices}: without a log of what is written to memory, the guest has to stand still while all of that is sent, \
         about {} ms, and it may for {} ms: give it more (downtime_ms), or say that it may (unlogged_dma)",
        estimate.as_millis(),
        downtime.as_millis()
    )]
    UnloggedDma {
        /// The devices that keep no log.
        devices: String,
        /// How long it would take.
        estimate: Duration,
        /// How long it may.
        downtime: Duration,
    },
}

impl SendError {
    /// Whether the destination has gone, as far as one can see.
    fn is_hangup(&self) -> bool {
        match self {
            Self::Connect(ConnectError::Connect { .. }) => true,
            Self::Wire(WireError::Io(error))
            | Self::Memory(WireError::Io(error))
            | Self::Device(DeviceDataError::Copy { source: error, .. }) => matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::UnexpectedEof
            ),
            _ => false,
        }
    }
}

/// What the source says first: what the VM is like, and how it comes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Offer {
    pub(crate) machine: Description,
    /// Over how many connections RAM comes.
    pub(crate) connections: u8,
    /// What does not come, because it is here already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) handed: Option<HandedEstate>,
}

/// What the source says last: the state of all that is neither RAM nor a device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Last {
    pub(crate) state: MachineState,
    /// Whether the guest runs, or is paused.
    pub(crate) runs: bool,
    /// Where the devices have been left, if they run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) handed: Option<HandedDevices>,
}

/// Sends the VM of `machine`. If this succeeds, it runs at the destination, and must not here.
pub(crate) fn send(
    machine: &Machine,
    request: &SendRequest,
    task: &Task,
) -> Result<Departed, SendError> {
    if request.local {
        if !matches!(request.destination, MigrationUrl::Unix(_)) {
            return Err(SendError::NotLocal(request.destination.clone()));
        }
        machine.check_can_be_left()?;
    } else {
        machine.check_migratable()?;
    }
    let route = Route::new(
        request.destination.clone(),
        request.tls_dir.as_deref(),
        request.insecure,
    )?;
    let id = MigrationId::new().map_err(WireError::from)?;
    task.update(|progress| {
        progress.id = Some(id.to_string());
        progress.memory_bytes = machine.memory.size();
    });
    let mut control = route.connect(task.cancel())?;
    let greeted = wire::say_hello(&mut control, Role::Control, id);
    greeted.map_err(WireError::from)?;
    let mut sent = if request.local {
        local::hand_over(machine, request, task, &route, id, &mut control)
    } else {
        offer(&mut control, machine, request)
            .and_then(|()| transfer(machine, request, task, &route, id, &mut control))
    };
    if let Err(error) = &mut sent {
        // It may have gone long since.
        control.ignore_cancel();
        control.set_patience(Some(FAREWELL));
        // If so, it may have said why before, while nobody listened.
        if error.is_hangup()
            && let Err(WireError::Refused(reason)) = wire::receive(&mut control)
        {
            *error = SendError::Refused(reason);
        }
        let _ = wire::refuse(&mut control, error);
        if let SendError::Unprepared(_) = error {
            // It may be in doubt, and is not any more if it is asked. If it cannot be, its user has to say so there.
            let _ = ask(&route, id, task);
        }
    }
    sent
}

/// How a migration ended whose VM is not here as it was.
#[derive(Debug)]
pub(crate) enum Departed {
    /// The destination has the VM.
    Gone,
    /// Nobody knows, and this VMM ends.
    Abandoned,
}

/// Tells of the VM, and waits until the destination has made one like it.
fn offer(control: &mut Stream, machine: &Machine, request: &SendRequest) -> Result<(), SendError> {
    let offer = serde_json::to_vec(&Offer {
        machine: machine.describe()?,
        connections: request.connections,
        handed: None,
    })?;
    wire::send(control, Kind::Machine, &[&offer]).map_err(WireError::from)?;
    await_ready(control)
}

/// Waits until the destination has made the machine.
pub(super) fn await_ready(control: &mut Stream) -> Result<(), SendError> {
    // It may have to wait for the servers of its devices, and each of them has its own time limit.
    control.set_patience(Some(MAKING));
    wire::expect(control, Kind::Ready)?;
    Ok(())
}

/// How long the destination may take to make the machine.
const MAKING: Duration = Duration::from_secs(120);

fn transfer(
    machine: &Machine,
    request: &SendRequest,
    task: &Task,
    route: &Route,
    id: MigrationId,
    control: &mut Stream,
) -> Result<Departed, SendError> {
    let mut lanes = Lanes::open(&machine.memory, route, id, request.connections, task)?;
    task.enter(Phase::Precopy);
    let mut early = Early::start(machine)?;
    let mut tracking = Tracking::start(machine)?;
    let left = precopy::copy(
        &mut tracking,
        &mut lanes,
        &mut early,
        control,
        request,
        task,
    )?;

    let mut downtime = Downtime::begin();
    // What follows, whatever goes wrong has the VM go on.
    let paused = Paused::pause(machine)?;
    downtime.has_done("pause");
    task.enter(Phase::StopAndCopy);
    // A destination that hangs from now on keeps the guest waiting.
    control.set_patience(Some(PATIENCE));
    let frozen = machine.freeze()?;
    downtime.has_done("devices");
    let mut pages = tracking.take()?;
    pages.add_all(&left);
    downtime.has_done("dirty_log");
    send_rest(&frozen, &pages, &mut lanes, control, paused.ran, task)?;
    downtime.has_done("copy");
    await_prepared(control)?;
    downtime.has_done("destination");
    let ended = commit(control, route, id, task);
    conclude(ended, frozen, paused, downtime, task)
}

/// Waits until the destination could run the VM.
pub(super) fn await_prepared(control: &mut Stream) -> Result<(), SendError> {
    match wire::expect(control, Kind::Prepared) {
        Ok(_) => Ok(()),
        Err(WireError::Refused(reason)) => Err(SendError::Refused(reason)),
        Err(error) => Err(SendError::Unprepared(error)),
    }
}

/// What has become of a VM that stands still here, as its destination says.
pub(super) fn conclude(
    ended: Source,
    frozen: Frozen<'_>,
    paused: Paused<'_>,
    mut downtime: Downtime,
    task: &Task,
) -> Result<Departed, SendError> {
    match ended {
        Source::Gone => {
            downtime.has_done("commit");
            downtime.tell(task);
            frozen.abandon();
            paused.abandon();
            Ok(Departed::Gone)
        }
        Source::Kept => {
            // The devices go on before the guest does.
            drop(frozen);
            drop(paused);
            let reason = "it had everything, and refuses all the same";
            Err(SendError::Refused(reason.to_owned()))
        }
        _ => {
            frozen.abandon();
            paused.abandon();
            Ok(Departed::Abandoned)
        }
    }
}

/// Sends all that has not been sent.
fn send_rest(
    frozen: &Frozen<'_>,
    pages: &Pages,
    lanes: &mut Lanes<'_>,
    control: &mut Stream,
    runs: bool,
    task: &Task,
) -> Result<(), SendError> {
    let machine = frozen.machine();
    let load = Load {
        pages,
        fresh: false,
        log: None,
        limit: u64::MAX,
        // It says itself when it has everything.
        awaited: false,
    };
    lanes
        .send(&load, task)
        .and_then(|_| lanes.end())
        .map_err(SendError::Memory)?;
    for (index, device) in (0..).zip(machine.pci.devices()) {
        let bytes = device_data::read(device, |piece| precopy::send_piece(control, index, piece))?;
        precopy::tell_of_device(device, bytes, task);
    }
    let last = serde_json::to_vec(&Last {
        state: frozen.state()?,
        runs,
        handed: None,
    })?;
    wire::send(control, Kind::State, &[&last]).map_err(WireError::from)?;
    Ok(())
}

/// Has the destination run the VM, and finds out whether it does, for as long as that takes.
pub(super) fn commit(control: &mut Stream, route: &Route, id: MigrationId, task: &Task) -> Source {
    task.enter(Phase::Committing);
    // From here on it is too late to cancel.
    control.ignore_cancel();
    let mut state = Source::Sending.on(SourceInput::Prepared);
    let mut error = match order(control) {
        Ok(input) => {
            state = state.on(input);
            None
        }
        Err(error) => {
            state = state.on(SourceInput::Failed);
            Some(error)
        }
    };
    // The link may have been cut just now, and be mended at once.
    if state == Source::InDoubt
        && let Ok(input) = ask(route, id, task)
    {
        state = state.on(input);
    }
    while state == Source::InDoubt {
        if let Some(error) = error.take() {
            task.enter_doubt(ControlError::InDoubt {
                peer: "the destination",
                source: error.into(),
            });
        }
        match task.next_order(ASK_AGAIN) {
            Order::Abandon => break,
            Order::Wait => {
                if let Ok(input) = ask(route, id, task) {
                    state = state.on(input);
                }
            }
            Order::Resolve(resolution, reply) => {
                let input = match resolution {
                    Resolution::Run => Ok(SourceInput::Forced),
                    // The copy here is none any more.
                    Resolution::Discard => Ok(SourceInput::Committed),
                    Resolution::Ask => ask(route, id, task),
                };
                match input {
                    Ok(input) => {
                        state = state.on(input);
                        reply.send(Ok(()));
                    }
                    Err(error) => reply.send(Err(ControlError::failed(
                        "the destination does not say whether it runs the VM",
                        error,
                    ))),
                }
            }
        }
    }
    state
}

/// Says that the destination is to run the VM, and hears whether it does.
fn order(control: &mut Stream) -> Result<SourceInput, WireError> {
    // A destination that has gone before it could hear this may have said why.
    let _ = wire::send(control, Kind::Commit, &[]);
    let input = hear(control)?;
    if input == SourceInput::Committed {
        // It need not wait for questions any more. If it does not hear that, no harm is done.
        let _ = wire::send(control, Kind::Heard, &[]);
    }
    Ok(input)
}

/// Asks the destination how the migration ended.
fn ask(route: &Route, id: MigrationId, task: &Task) -> Result<SourceInput, SendError> {
    let mut stream = route.connect(task.abandon())?;
    stream.set_patience(Some(ANSWER));
    wire::say_hello(&mut stream, Role::Question, id).map_err(WireError::from)?;
    Ok(hear(&mut stream)?)
}

fn hear(stream: &mut Stream) -> Result<SourceInput, WireError> {
    match wire::receive(stream) {
        Ok((Kind::Committed, _)) => Ok(SourceInput::Committed),
        Err(WireError::Refused(_)) => Ok(SourceInput::Refused),
        Ok((Kind::Unknown, _)) => Err(WireError::Unexpected(
            "that it knows nothing of this migration; it is not the process that it was".to_owned(),
        )),
        Ok((kind, _)) => Err(WireError::Unexpected(format!("{kind:?}"))),
        Err(error) => Err(error),
    }
}

/// The vCPUs of a machine, which stand still, and go on when this is dropped if they ran before.
#[derive(Debug)]
pub(super) struct Paused<'m> {
    machine: &'m Machine,
    pub(super) ran: bool,
}

impl<'m> Paused<'m> {
    pub(super) fn pause(machine: &'m Machine) -> Result<Self, SendError> {
        let vcpus = &machine.vcpus;
        let ran = vcpus.run_state() == RunState::Running;
        let paused = Self { machine, ran };
        vcpus.pause();
        if vcpus.wait_paused(Instant::now() + PAUSE) {
            Ok(paused)
        } else {
            Err(SendError::Pause)
        }
    }

    /// Leaves them as they are: they run elsewhere.
    fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if self.ran {
            self.machine.vcpus.resume();
        }
    }
}

/// How long the guest stands still, and what that time goes to.
#[derive(Debug)]
pub(super) struct Downtime {
    began: Instant,
    last: Instant,
    parts: BTreeMap<String, u64>,
}

impl Downtime {
    pub(super) fn begin() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            last: now,
            parts: BTreeMap::new(),
        }
    }

    pub(super) fn has_done(&mut self, part: &str) {
        let now = Instant::now();
        let time = microseconds(now.duration_since(self.last));
        self.parts.insert(part.to_owned(), time);
        self.last = now;
    }

    fn tell(self, task: &Task) {
        let whole = microseconds(self.last.duration_since(self.began));
        task.update(|progress| {
            progress.downtime_us = Some(whole);
            progress.downtime_parts_us = self.parts;
        });
    }
}
