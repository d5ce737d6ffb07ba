//! A VM's state in a directory: what it is and the state of its platform in `machine.json`, its RAM in `ram`, and each
//! device's own state in `device-0` and so on, in the order in which they were attached.
//!
//! `machine.json` is written last, so a directory without it has no snapshot. The files are never mapped: a guest would
//! write into one that is shared, and devices would not see what a guest writes into one that is private.

mod folder;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::folder::Folder;
use crate::machine::device_data::{self, DeviceDataError};
use crate::machine::state::{Description, MachineState, StateError, VERSION};
use crate::machine::{FreezeError, Frozen, Machine};
use crate::memory::Memory;
use crate::sparse::{self, FilePart, Sink};

/// The longest `machine.json`, in bytes: 254 vCPUs take a tenth of it.
const MAX_DOCUMENT: u64 = 64 << 20;

const MACHINE: &str = "machine.json";
const RAM: &str = "ram";

/// Why there is no snapshot, or none that can be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// A file of it.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// The directory has one already.
    #[error("{} has a snapshot already; choose another directory, or remove it", .0.display())]
    Exists(PathBuf),
    /// The directory has none.
    #[error("{} has no complete snapshot", .0.display())]
    Incomplete(PathBuf),
    /// `machine.json` is none.
    #[error("{} is no description of a VM", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// `machine.json` is in a version that this program does not know.
    #[error(
        "{} is in version {version} of the format, and this program reads version {VERSION}",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A file is longer or shorter than it was.
    #[error("{} is {here} bytes long, and should be {expected}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        here: u64,
        /// What it should be.
        expected: u64,
    },
    /// The VM cannot be held still.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The state of the platform cannot be had.
    #[error(transparent)]
    State(#[from] StateError),
    /// The state of a device cannot be had or taken.
    #[error(transparent)]
    Device(#[from] DeviceDataError),
}

/// What `machine.json` has.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    machine: Description,
    state: MachineState,
    /// How long the files of the devices are, in bytes. A device need not notice that it is given less than it gave.
    device_bytes: Vec<u64>,
}

/// As much of a [`Document`] as all versions have in common.
#[derive(Debug, Deserialize)]
struct Head {
    machine: HeadOfMachine,
}

#[derive(Debug, Deserialize)]
struct HeadOfMachine {
    version: u32,
}

/// Writes the state of a paused machine into a directory, which is made if there is none. `progress` hears of bytes of RAM
/// and, as 0, of other steps, and can end it with any of them. The machine stays paused, and its devices run again when this returns.
pub(crate) fn save(
    machine: &Machine,
    path: &Path,
    progress: &(impl Fn(u64) -> io::Result<()> + Sync),
) -> Result<(), SnapshotError> {
    machine.check_migratable()?;
    let mut folder = Folder::create(path, MACHINE)?;
    let frozen = machine.freeze()?;
    let mut device_bytes = Vec::new();
    for (index, device) in machine.pci.devices().iter().enumerate() {
        let mut file = folder.create_file(&device_file(index))?;
        let bytes = device_data::read(device, |bytes| {
            progress(0)?;
            file.write_all(bytes)
        });
        device_bytes.push(bytes?);
        folder.keep(&device_file(index), &file)?;
    }
    save_ram(&frozen, &mut folder, progress)?;
    let document = Document {
        machine: machine.describe()?,
        state: frozen.state()?,
        device_bytes,
    };
    let document = serde_json::to_vec(&document).map_err(|source| SnapshotError::Document {
        path: path.join(MACHINE),
        source,
    })?;
    folder.complete(MACHINE, &document)
}

fn save_ram(
    frozen: &Frozen<'_>,
    folder: &mut Folder,
    progress: &(impl Fn(u64) -> io::Result<()> + Sync),
) -> Result<(), SnapshotError> {
    let memory = &frozen.machine().memory;
    let file = folder.create_file(RAM)?;
    let failed = |source| SnapshotError::File {
        path: folder.path(RAM),
        source,
    };
    file.set_len(memory.size()).map_err(failed)?;
    let mut start = 0;
    for region in memory.regions() {
        let length = region.range.end - region.range.start;
        let from = FilePart {
            file: region.file,
            start: 0,
        };
        let to = FilePart { file: &file, start };
        sparse::copy(&from, length, &to, progress).map_err(failed)?;
        start += length;
    }
    folder.keep(RAM, &file)
}

fn device_file(index: usize) -> String {
    format!("device-{index}")
}

/// A snapshot that has been read, except for RAM and the devices.
#[derive(Debug)]
pub(crate) struct Snapshot {
    folder: Folder,
    /// What the VM is like.
    pub(crate) machine: Description,
    /// The state of its platform.
    pub(crate) state: MachineState,
    device_bytes: Vec<u64>,
}

impl Snapshot {
    /// Reads what is not large.
    pub(crate) fn open(path: &Path) -> Result<Self, SnapshotError> {
        let folder = Folder::open(path)?;
        let Some(file) = folder.open_file_if_any(MACHINE)? else {
            return Err(SnapshotError::Incomplete(path.to_owned()));
        };
        let path = folder.path(MACHINE);
        let mut text = Vec::new();
        file.take(MAX_DOCUMENT)
            .read_to_end(&mut text)
            .map_err(|source| SnapshotError::File {
                path: path.clone(),
                source,
            })?;
        let Document {
            machine,
            state,
            device_bytes,
        } = parse(&text, &path)?;
        Ok(Self {
            folder,
            machine,
            state,
            device_bytes,
        })
    }

    /// Reads RAM into memory that nobody has written to yet. `progress` hears of bytes, and can end it.
    pub(crate) fn load_ram(
        &self,
        memory: &Memory,
        progress: &(impl Fn(u64) -> io::Result<()> + Sync),
    ) -> Result<(), SnapshotError> {
        let file = self.open_file(RAM, memory.size())?;
        let failed = |source| SnapshotError::File {
            path: self.folder.path(RAM),
            source,
        };
        let mut start = 0;
        for region in memory.regions() {
            let length = region.range.end - region.range.start;
            let from = FilePart { file: &file, start };
            let to = Ram {
                memory,
                start: region.range.start,
            };
            sparse::copy(&from, length, &to, progress).map_err(failed)?;
            start += length;
        }
        Ok(())
    }

    /// Has the devices of a machine take their state. They then stand still.
    pub(crate) fn load_devices(
        &self,
        machine: &Machine,
        progress: &impl Fn(u64) -> io::Result<()>,
    ) -> Result<(), SnapshotError> {
        let devices = machine.pci.devices().iter().enumerate();
        for (index, device) in devices {
            let expected = self.device_bytes.get(index).copied().unwrap_or(0);
            let mut file = self.open_file(&device_file(index), expected)?;
            device_data::write(device, |piece| {
                progress(0)?;
                file.read(piece)
            })?;
        }
        Ok(())
    }

    /// Opens a file that is so many bytes long.
    fn open_file(&self, name: &str, expected: u64) -> Result<File, SnapshotError> {
        let file = self.folder.open_file(name)?;
        let path = || self.folder.path(name);
        let metadata = file.metadata().map_err(|source| SnapshotError::File {
            path: path(),
            source,
        })?;
        match metadata.len() {
            here if here == expected => Ok(file),
            here => Err(SnapshotError::Length {
                path: path(),
                here,
                expected,
            }),
        }
    }
}

fn parse(text: &[u8], path: &Path) -> Result<Document, SnapshotError> {
    let failed = |source| SnapshotError::Document {
        path: path.to_owned(),
        source,
    };
    let head: Head = serde_json::from_slice(text).map_err(failed)?;
    match head.machine.version {
        VERSION => serde_json::from_slice(text).map_err(failed),
        version => Err(SnapshotError::Version {
            path: path.to_owned(),
            version,
        }),
    }
}

/// A region of guest RAM.
struct Ram<'m> {
    memory: &'m Memory,
    start: u64,
}

impl Sink for Ram<'_> {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory.write(self.start + offset, data)
    }
}
