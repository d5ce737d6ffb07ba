//! Pausing a guest in the middle of an access: nothing of it is lost, and nothing is done twice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};
use std::{fs, thread};

use iced_x86::code_asm::{al, byte_ptr, dword_ptr, dx, ebp, ecx, edi, edx};
use tests::device_thread::{DeviceThread, IDS};
use tests::outrigger::has_kvm;
use tests::tiny::{self, Code, FIRST_DEVICE, SCRATCH};
use vfio_user_server::{Bar, Description, Device};
use vmm::{
    Ending, IommufdConfig, MemoryConfig, PayloadConfig, SerialConfig, UserDeviceConfig, Vcpus, Vm,
    VmConfig,
};

/// A device whose memory BAR reads as a pattern and whose I/O BAR counts up, and that pauses the guest while it answers
/// one of the reads.
struct Pauser {
    /// How many bytes are read before the guest is paused.
    pause_at: u32,
    bytes_read: Arc<AtomicU32>,
    vcpus: Arc<OnceLock<Vcpus>>,
    paused: mpsc::Sender<()>,
}

const MEMORY: usize = 0;

/// The byte at this offset of the memory BAR.
fn pattern(offset: u64) -> u8 {
    offset.wrapping_mul(37).to_le_bytes()[0]
}

impl Device for Pauser {
    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        for (byte, offset) in data.iter_mut().zip(offset..) {
            let count = self.bytes_read.fetch_add(1, Ordering::Relaxed);
            *byte = if bar == MEMORY {
                pattern(offset)
            } else {
                count.to_le_bytes()[0]
            };
            if count == self.pause_at {
                self.vcpus.get().unwrap().pause();
                self.paused.send(()).unwrap();
            }
        }
        Ok(())
    }

    fn write(&mut self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}
}

/// Runs a guest, pauses it when it has read so many bytes of the device, lets it go on when it stands still, and says
/// what it printed, how many bytes it had read when it stood still, and how many in the end.
fn pause_and_resume(kernel: &Path, pause_at: u32) -> (String, u32, u32) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    let (sender, paused) = mpsc::channel();
    let bytes_read = Arc::new(AtomicU32::new(0));
    let vcpus = Arc::new(OnceLock::new());
    let pauser = Pauser {
        pause_at,
        bytes_read: bytes_read.clone(),
        vcpus: vcpus.clone(),
        paused: sender,
    };
    let description = Description::new(IDS)
        .bar(0, Bar::memory32(0x2000))
        .bar(1, Bar::io(0x10));
    let server = DeviceThread::custom(description, |_| pauser).unwrap();
    let mut vm = Vm::new(&VmConfig {
        payload: PayloadConfig {
            kernel: kernel.to_owned(),
            initramfs: None,
            cmdline: String::new(),
        },
        vcpus: 1,
        nested: true,
        memory: MemoryConfig {
            size: 64 << 20,
            hugepages: false,
            prefault: false,
        },
        serial: SerialConfig::File(output.clone()),
        disks: Vec::new(),
        nets: Vec::new(),
        devices: Vec::new(),
        iommufd: IommufdConfig::Auto,
        user_devices: vec![UserDeviceConfig {
            id: "pauser".into(),
            socket: server.socket().to_owned(),
        }],
    })
    .unwrap();
    let handle = vcpus.get_or_init(|| vm.vcpus()).clone();
    let deadline = Instant::now() + Duration::from_secs(30);
    let (ending, read) = thread::scope(|scope| {
        let run = scope.spawn(move || vm.run().unwrap());
        paused.recv_timeout(Duration::from_secs(30)).unwrap();
        assert!(
            handle.wait_paused(deadline),
            "the guest does not stand still"
        );
        let read = bytes_read.load(Ordering::Relaxed);
        assert!(handle.wait_paused(deadline));
        assert_eq!(
            read,
            bytes_read.load(Ordering::Relaxed),
            "a paused guest reads"
        );
        handle.resume();
        (run.join().unwrap(), read)
    });
    assert_eq!(ending, Ending::PowerOff);
    (
        fs::read_to_string(output).unwrap(),
        read,
        bytes_read.load(Ordering::Relaxed),
    )
}

/// Has the device decode its BARs, and takes their addresses: EBP the memory's, EDX the ports'.
fn find_bars(code: &mut Code) -> Result<(), iced_x86::IcedError> {
    code.store(FIRST_DEVICE + 4, 3)?;
    code.mov(ebp, dword_ptr(FIRST_DEVICE + 0x10))?;
    code.mov(edx, dword_ptr(FIRST_DEVICE + 0x14))?;
    code.and(edx, !3)
}

#[test]
fn read_that_crosses_a_page_is_done_once() {
    if !has_kvm() {
        return;
    }
    let expected = u32::from_le_bytes([0xffe, 0xfff, 0x1000, 0x1001].map(pattern));
    let kernel = tiny::guest(|code| {
        let mut wrong = code.create_label();
        find_bars(code)?;
        code.cmp(dword_ptr(ebp + 0xffe), expected)?;
        code.jne(wrong)?;
        code.print(b'Y')?;
        code.power_off()?;
        code.set_label(&mut wrong)?;
        code.print(b'N')?;
        code.power_off()
    })
    .unwrap();
    for pause_at in 0..4 {
        // The guest stands still between instructions, so the second half has been read by then, too.
        let result = pause_and_resume(kernel.path(), pause_at);
        assert_eq!(result, ("Y".into(), 4, 4), "paused at byte {pause_at}");
    }
}

#[test]
fn string_input_goes_on_where_it_was() {
    if !has_kvm() {
        return;
    }
    const BYTES: u32 = 96;
    let kernel = tiny::guest(|code| {
        let (mut next, mut wrong) = (code.create_label(), code.create_label());
        find_bars(code)?;
        code.mov(edi, SCRATCH)?;
        code.mov(ecx, BYTES)?;
        code.rep().insb()?;
        // Every byte is what its place says.
        code.xor(ecx, ecx)?;
        code.set_label(&mut next)?;
        code.cmp(byte_ptr(ecx + SCRATCH), iced_x86::code_asm::cl)?;
        code.jne(wrong)?;
        code.inc(ecx)?;
        code.cmp(ecx, BYTES)?;
        code.jne(next)?;
        code.in_(al, dx)?;
        code.print(b'Y')?;
        code.power_off()?;
        code.set_label(&mut wrong)?;
        code.print(b'N')?;
        code.power_off()
    })
    .unwrap();
    for pause_at in [0, 1, 17, 63, 64, BYTES - 1] {
        let (printed, _, read) = pause_and_resume(kernel.path(), pause_at);
        assert_eq!(
            (printed.as_str(), read),
            ("Y", BYTES + 1),
            "paused at byte {pause_at}"
        );
    }
}
