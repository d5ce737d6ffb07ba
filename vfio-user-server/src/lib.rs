//! The device's end of a vfio-user connection: a library to write PCI devices with, which run in a process of their own
//! and appear in the virtual machines of every VMM that speaks vfio-user.
//!
//! # Bring your own device
//!
//! A device is two things: a [`Description`], which says what it is, and a type that implements [`Device`], which says
//! what its registers do. The library does the rest: the protocol, configuration space, MSI, MSI-X and the wired
//! interrupt, guest memory, doorbells, the log of written memory, and the states of a migration.
//!
//! Here is all of a device that adds up guest memory. Its driver writes the address and the length of some memory, rings
//! the doorbell, and gets an interrupt when the sum is there.
//!
//! ```
//! use std::io;
//! use std::path::Path;
//!
//! use vfio_user_server::{
//!     Bar, Description, Device, Doorbell, Host, Ids, Listener, Migration, MsixTable, Options,
//!     Registers, Server, ServerError, Snapshot,
//! };
//!
//! // The registers in BAR 0.
//! const ADDRESS: u64 = 0x00;
//! const ADDRESS_HIGH: u64 = 0x04;
//! const LENGTH: u64 = 0x08;
//! const SUM: u64 = 0x0c;
//! const STATUS: u64 = 0x10;
//! const START: u64 = 0x20;
//!
//! /// What the device is.
//! fn description() -> Description {
//!     Description::new(Ids {
//!         vendor: 0x4f52,
//!         device: 0xadd0,
//!         subsystem_vendor: 0x4f52,
//!         subsystem: 0x0001,
//!         revision: 1,
//!         class: 0x12_00_00, // processing accelerator
//!     })
//!     .bar(0, Bar::memory32(0x1000))
//!     .bar(1, Bar::memory32(0x1000))
//!     .express()
//!     .msix(MsixTable {
//!         vectors: 1,
//!         table_bar: 1,
//!         table_offset: 0,
//!         pending_bar: 1,
//!         pending_offset: 0x800,
//!     })
//!     .doorbell(Doorbell {
//!         bar: 0,
//!         offset: START,
//!         size: 4,
//!         value: None,
//!     })
//! }
//!
//! /// The device: what is in its registers, and its way to the rest of the machine.
//! struct Adder {
//!     host: Host,
//!     registers: [u32; 5],
//! }
//!
//! impl Adder {
//!     fn new(host: &Host) -> Self {
//!         Self {
//!             host: host.clone(),
//!             registers: [0; 5],
//!         }
//!     }
//!
//!     /// Adds up what the driver has asked for. Nothing that it asks for can do harm: memory that is not there, or that
//!     /// the device may not read, is an error.
//!     fn sum(&self) -> Option<u32> {
//!         let [low, high, length, ..] = self.registers;
//!         let mut bytes = vec![0; usize::try_from(length.min(1 << 20)).ok()?];
//!         let address = u64::from(high) << 32 | u64::from(low);
//!         self.host.memory.read(address, &mut bytes).ok()?;
//!         Some(bytes.into_iter().map(u32::from).sum())
//!     }
//! }
//!
//! impl Device for Adder {
//!     fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
//!         match bar {
//!             0 => self.read_registers(offset, data),
//!             _ => Err(io::ErrorKind::InvalidInput.into()),
//!         }
//!     }
//!
//!     fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
//!         match bar {
//!             0 => self.write_registers(offset, data),
//!             _ => Err(io::ErrorKind::InvalidInput.into()),
//!         }
//!     }
//!
//!     fn reset(&mut self) {
//!         self.registers = [0; 5];
//!     }
//!
//!     fn doorbell(&mut self, _: usize) {
//!         let (sum, status) = match self.sum() {
//!             Some(sum) => (sum, 1),
//!             None => (0, 2),
//!         };
//!         self.registers[3] = sum;
//!         self.registers[4] = status;
//!         self.host.interrupts.trigger(0);
//!     }
//!
//!     fn migration(&mut self) -> Migration<'_> {
//!         Migration::Snapshot(self)
//!     }
//! }
//!
//! impl Registers for Adder {
//!     fn register(&mut self, offset: u64) -> io::Result<u32> {
//!         let index = usize::try_from(offset / 4).unwrap_or(usize::MAX);
//!         Ok(self.registers.get(index).copied().unwrap_or(0))
//!     }
//!
//!     fn set_register(&mut self, offset: u64, value: u32) -> io::Result<()> {
//!         match offset {
//!             ADDRESS => self.registers[0] = value,
//!             ADDRESS_HIGH => self.registers[1] = value,
//!             LENGTH => self.registers[2] = value,
//!             _ => {}
//!         }
//!         Ok(())
//!     }
//! }
//!
//! impl Snapshot for Adder {
//!     fn save(&mut self) -> io::Result<Vec<u8>> {
//!         Ok(self.registers.into_iter().flat_map(u32::to_le_bytes).collect())
//!     }
//!
//!     fn restore(&mut self, state: &[u8]) -> io::Result<()> {
//!         if state.len() != 4 * self.registers.len() {
//!             return Err(io::ErrorKind::InvalidData.into());
//!         }
//!         for (register, word) in self.registers.iter_mut().zip(state.as_chunks().0) {
//!             *register = u32::from_le_bytes(*word);
//!         }
//!         Ok(())
//!     }
//! }
//!
//! /// Serves the device, to one virtual machine after the other.
//! fn serve(path: &Path) -> Result<(), ServerError> {
//!     let mut server = Server::new(description(), Options::default(), Adder::new)?;
//!     let listener = Listener::bind(path)?;
//!     server.run(&listener)?;
//!     Ok(())
//! }
//! #
//! # // What a driver does, by a client in place of a virtual machine.
//! # use std::sync::Arc;
//! # use vfio_user_client::{Client, DmaAccess, DmaError, GuestDma};
//! # struct Ones;
//! # impl GuestDma for Ones {
//! #     fn read(&self, _: u64, data: &mut [u8]) -> Result<(), DmaError> {
//! #         data.fill(1);
//! #         Ok(())
//! #     }
//! #     fn write(&self, _: u64, _: &[u8]) -> Result<(), DmaError> {
//! #         Err(DmaError)
//! #     }
//! # }
//! # let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
//! # std::thread::spawn(move || {
//! #     let mut server = Server::new(description(), Options::default(), Adder::new).unwrap();
//! #     server.serve(theirs).unwrap();
//! # });
//! # let _ = serve;
//! # let options = vfio_user_client::Options::default();
//! # let client = Client::handshake(ours, Arc::new(Ones), &options).unwrap();
//! # client.dma_map(0x10_0000, 0x1000, None, DmaAccess::ReadWrite).unwrap();
//! # client.region_write(7, 4, &[6, 0]).unwrap();
//! # let mut sum_of = |address: u64, length: u32| {
//! #     client.region_write(0, ADDRESS, &address.to_le_bytes()).unwrap();
//! #     client.region_write(0, LENGTH, &length.to_le_bytes()).unwrap();
//! #     client.region_write(0, START, &[0; 4]).unwrap();
//! #     let mut answer = [0; 8];
//! #     client.region_read(0, SUM, &mut answer).unwrap();
//! #     answer
//! # };
//! # assert_eq!(sum_of(0x10_0000, 1000), [0xe8, 3, 0, 0, 1, 0, 0, 0]);
//! # assert_eq!(sum_of(0x20_0000, 1000), [0, 0, 0, 0, 2, 0, 0, 0]);
//! # assert_eq!(STATUS, SUM + 4);
//! ```
//!
//! Run it, and give its socket to a virtual machine: `outrigger --user-device socket=adder.sock`, or QEMU's
//! `-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"adder.sock"}}'`.
//!
//! # Threads
//!
//! One thread calls the device. A device that does work beside it has threads of its own, which use clones of the
//! [`Host`]: [`Interrupts`], [`Memory`] and [`Doorbells`] may be used by any thread at any time. Such a device implements
//! [`Device::stop`] and [`Device::start`].
//!
//! # Who is trusted
//!
//! Neither the guest nor, with one exception, the client. No message makes the library panic, wait for ever, or keep more
//! memory than what is agreed on; whatever is wrong has an errno. What is the guest's arrives at the device: offsets and
//! values of registers, and addresses, which [`Memory`] checks. The exception is a file that a client sends as guest memory
//! and cuts off afterwards: see [`Options::sealed_memory`].
//!
//! # Clients that came before
//!
//! The library speaks to what there is: where the specification and libvfio-user differ, it follows the specification in
//! what it sends and takes both in what it receives.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

mod config;
mod core;
mod description;
mod device;
mod dirty;
mod doorbell;
mod errno;
mod eventfd;
mod function;
mod link;
mod memory;
mod migration;
mod reader;
mod registers;
mod server;
mod session;
mod socket;

pub use description::{
    Bar, Description, DescriptionError, Doorbell, Ids, MAX_DOORBELLS, MsixTable, Place,
    WINDOW_SIZE, Window,
};
pub use device::{Device, Host, Migration, Snapshot, StateStream};
pub use dirty::PageLog;
pub use doorbell::{DoorbellEvent, Doorbells};
pub use function::{InterruptMode, Interrupts};
pub use link::Ended;
pub use memory::{Memory, MemoryError, View};
pub use migration::MAX_SNAPSHOT;
pub use registers::Registers;
pub use server::{Listener, Options, Server, ServerError, Stopper};
