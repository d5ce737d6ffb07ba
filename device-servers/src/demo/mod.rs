//! The demo device: everything that a vfio-user client can meet, at the register of your choice.
//!
//! # BARs
//!
//! | BAR | is | holds |
//! |---|---|---|
//! | 0 | memory, 32 bits, 4 KiB | the registers below, and doorbells from 0x800 on |
//! | 1 | memory, 32 bits, 4 KiB | the MSI-X table at 0, its pending bits at 0x800 |
//! | 2 | memory, 64 bits, prefetchable, 64 KiB | RAM, which can be mapped from 0x4000 to 0xc000 |
//! | 4 | I/O, 32 bytes | RAM, but for the doorbell at 0x10 |
//!
//! Besides INTA, it has 4 vectors of MSI and, unless [`Options`] say otherwise, 64 of MSI-X.
//!
//! # Registers
//!
//! All are 32 bits wide and little-endian, and can be read at any width. Those that do something are to be written
//! whole. What no line says otherwise about reads as it was written, and as 0 after a reset.
//!
//! | offset | name | is |
//! |---|---|---|
//! | 0x00 | `MAGIC` | Reads as 0x6d61676f. |
//! | 0x04 | `RESETS` | How often the device was reset since its server started. |
//! | 0x08 | `SCRATCH` | Eight bytes to keep things in. |
//! | 0x10 | `RAISE` | Write n: send vector n of MSI-X or MSI, whichever is enabled. Reads as 0. |
//! | 0x14 | `INTX` | Bit 0: the level of the INTx line. |
//! | 0x18 | `DMA_ADDRESS` | Guest-physical address of a transfer, 64 bits. |
//! | 0x20 | `DMA_LENGTH` | Bytes in a transfer, at most 1 MiB. |
//! | 0x24 | `DMA_SEED` | Where the [`pattern`] of a transfer starts. |
//! | 0x28 | `DMA_COMMAND` | Write 1: write the pattern to guest memory. Write 2: read guest memory. The transfer is finished when the register's write is; with bit 8 set it is done later, by a thread of the device's own, which then sends vector 1. Reads as 0. |
//! | 0x2c | `DMA_STATUS` | 0: the last transfer went well. 1: it did not. 2: it is not finished. |
//! | 0x30 | `DMA_SUM` | The [`checksum`] of what the last transfer read. |
//! | 0x34 | `RAM_OFFSET` | An offset in BAR 2. |
//! | 0x38 | `RAM_DATA` | The four bytes of BAR 2 at that offset, as the device sees them. |
//! | 0x3c | `RAM_TRAPS` | How many accesses to BAR 2 came as messages. A reset leaves it. |
//! | 0x40 | `VECTORS` | Number of MSI-X vectors. |
//! | 0x44 | `DOORBELLS` | Number of doorbells. |
//! | 0x48 | `FAULT` | The errno with which accesses to `FAULT_DATA` are refused; 0: they are not. |
//! | 0x4c | `FAULT_DATA` | Four bytes to keep things in. |
//! | 0x50 | `DELAY` | How many milliseconds an access to `DELAY_DATA` takes, at most 60000. |
//! | 0x54 | `DELAY_DATA` | Four bytes to keep things in. |
//! | 0x58 | `RESET_DELAY` | How many milliseconds the next reset takes, at most 60000. |
//! | 0x5c | `STATE_FAULT` | The errno with which the device refuses to stop, to start and to be saved; 0: it does not. |
//! | 0x60 | `STATE_SIZE` | How many KiB of filler the device's migration state has, besides what it needs. |
//! | 0x64 | `EARLY_SIZE` | How many KiB of filler the device has to save before it is stopped. |
//! | 0x68 | `WRITER_PERIOD` | Every so many microseconds, write the number of the write, 64 bits, to one page after the other of the `DMA_LENGTH` bytes at `DMA_ADDRESS`; 0: don't. |
//! | 0x6c | `WRITER_COUNT` | How many such writes have been done. Writable. |
//! | 0x70 | `WRITER_ERRORS` | How many of them have failed. |
//! | 0x80 + 4n | `RUNG` | How often doorbell n has rung. Rings that come fast may count as one. Writable. |
//!
//! # Doorbells
//!
//! | n | BAR | offset | written with | value |
//! |---|---|---|---|---|
//! | 0 | 0 | 0x800 | 4 bytes | any |
//! | 1 | 0 | 0x804 | 4 bytes | 1 |
//! | 2 | 0 | 0x804 | 4 bytes | 2 |
//! | 3 | 0 | 0x808 | 8 bytes | any |
//! | 4 | 0 | 0x810 | 2 bytes | any |
//! | 5 | 0 | 0x812 | 1 byte | 0xa5 |
//! | 6 | 4 | 0x10 | 2 bytes | any |
//!
//! # Migration
//!
//! The state is the registers, BAR 2 and BAR 4, and then as much filler as `STATE_SIZE` says, which is checked where it
//! arrives. `RESETS` and all else that counts goes along. A transfer that is not finished when the device is stopped is
//! finished where it runs next, and the writer goes on with its next number.

mod device;
mod filler;
mod registers;
mod state;
mod worker;

use std::path::PathBuf;

use vfio_user_server::{Listener, Server, ServerError};

pub use self::device::Demo;
pub use self::registers::{checksum, pattern};

/// What there is to decide about the demo device.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen. A socket that is left over there is replaced.
    pub socket: PathBuf,
    /// Number of MSI-X vectors, from 1 to 128.
    pub vectors: u16,
    /// What there is to decide about the server.
    pub server: vfio_user_server::Options,
}

impl Options {
    /// The usual demo device, at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            vectors: 64,
            server: vfio_user_server::Options::default(),
        }
    }
}

/// Serves the demo device to one client after the other, for ever. Calls `ready` when clients may connect.
///
/// # Errors
///
/// [`ServerError`] if the device or the socket cannot be made, or no more clients can be accepted.
pub fn serve(options: &Options, ready: impl FnOnce()) -> Result<(), ServerError> {
    let mut server = server(options)?;
    let listener = Listener::bind(&options.socket)?;
    ready();
    server.run(&listener).map_err(ServerError::from)
}

/// Makes the demo device and its server, for those who have a connected socket.
///
/// # Errors
///
/// [`ServerError`] if there cannot be as many vectors, or there is no memory or descriptor for the device.
pub fn server(options: &Options) -> Result<Server<Demo>, ServerError> {
    let ram = device::ram()?;
    let description = device::description(&ram, options.vectors);
    Server::new(description, options.server, |host| {
        Demo::new(host.clone(), ram, options.vectors)
    })
}
