//! The least that a VMM can do: the limit that the kernel sets.
//!
//! [`run`] is a VMM of its own, in a process of its own as the others are, with one CPU and the device of
//! [`crate::device`], whose registers are behind a socket. Each access to them is an exit to user space and a message
//! there and back, with as many bytes as vfio-user's. The device's doorbell is an ioeventfd and its interrupt an irqfd.
//! [`Server`] is the other end of the socket.

mod kvm;
mod server;

use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use kvm_ioctls::VcpuExit;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use self::kvm::Machine;
pub(crate) use self::kvm::dirty_scan;
pub(crate) use self::server::Server;
use crate::device::{CONFIG, DEVICE};

/// Where the device's BARs 0 and 1 are.
const BARS: [u32; 2] = [0xd000_0000, 0xd010_0000];
/// Bytes of a BAR.
const BAR_SIZE: u64 = 0x1000;

// The messages that stand for vfio-user's, by their first byte, and how long those and their answers are.
const READ: u8 = 1;
const WRITE: u8 = 2;
const SHORT: usize = 32;
const LONG: usize = 36;

/// Runs a tiny guest until it is killed.
///
/// # Errors
/// When there is no KVM, no server at the socket, or the guest does what tiny guests do not.
pub(crate) fn run(kernel: &Path, socket: &Path) -> anyhow::Result<()> {
    let mut machine = Machine::new(kernel, BARS[0])?;
    let stream = UnixStream::connect(socket).context("connecting to the device")?;
    for fd in machine.shared() {
        send(&stream, fd)?;
    }
    let mut bus = Bus { stream, address: 0 };
    loop {
        match machine.vcpu.run()? {
            VcpuExit::IoOut(port, data) => bus.out(port, data)?,
            VcpuExit::IoIn(port, data) => bus.input(port, data)?,
            VcpuExit::MmioRead(address, data) => bus.read(address, data)?,
            VcpuExit::MmioWrite(address, data) => bus.write(address, data)?,
            exit => bail!("the guest ended with {exit:?}"),
        }
    }
}

fn send(stream: &UnixStream, fd: RawFd) -> anyhow::Result<()> {
    stream
        .send_with_fd([0u8].as_slice(), fd)
        .context("sharing with the device")?;
    Ok(())
}

/// The ports, and the device with its registers.
struct Bus {
    stream: UnixStream,
    /// CONFIG_ADDRESS.
    address: u32,
}

impl Bus {
    fn out(&mut self, port: u16, data: &[u8]) -> io::Result<()> {
        match (port, data) {
            (0xcf8, data) => self.address = word(data),
            (0x3f8, data) => {
                let mut output = io::stdout();
                output.write_all(data)?;
                output.flush()?;
            }
            _ => {}
        }
        Ok(())
    }

    fn input(&mut self, port: u16, data: &mut [u8]) -> io::Result<()> {
        // Device 1 is the only one.
        let device = self.address >> 11 & 0x1f;
        let register = u16::try_from(self.address & 0xfc).unwrap_or_default();
        let value = match (port, device, register) {
            (0xcfc, 1, 0) => DEVICE,
            (0xcfc, 1, 0x10) => BARS[0],
            (0xcfc, 1, 0x14) => BARS[1],
            (0xcfc, 1, CONFIG) => return self.ask(data),
            (0xcfc, 1, _) => 0,
            _ => u32::MAX,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
        Ok(())
    }

    fn read(&mut self, address: u64, data: &mut [u8]) -> io::Result<()> {
        if is_register(address) {
            self.ask(data)
        } else {
            data.fill(0);
            Ok(())
        }
    }

    fn write(&mut self, address: u64, data: &[u8]) -> io::Result<()> {
        if !is_register(address) {
            return Ok(());
        }
        let offset = address - u64::from(BARS[0]);
        let mut message = [WRITE; LONG];
        for (to, from) in message.iter_mut().skip(16).zip(offset.to_le_bytes()) {
            *to = from;
        }
        for (to, from) in message.iter_mut().skip(SHORT).zip(data) {
            *to = *from;
        }
        self.stream.write_all(&message)?;
        self.stream.read_exact(&mut [0; SHORT])
    }

    /// Reads a register, wherever it is: all are zero.
    fn ask(&mut self, data: &mut [u8]) -> io::Result<()> {
        self.stream.write_all(&[READ; SHORT])?;
        let mut answer = [0; LONG];
        self.stream.read_exact(&mut answer)?;
        for (to, from) in data.iter_mut().zip(answer.iter().skip(SHORT)) {
            *to = *from;
        }
        Ok(())
    }
}

fn is_register(address: u64) -> bool {
    let start = u64::from(BARS[0]);
    (start..start + BAR_SIZE).contains(&address)
}

fn word(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}
