//! How long a start takes, and what the VMM then takes of the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use ::tests::device_thread::DeviceThread;
use ::tests::tiny;
use tempfile::NamedTempFile;

use crate::Bench;
use crate::measurement::{Aim, Better, Definition};
use crate::program::Running;
use crate::programs::{CLOUD_HYPERVISOR, Guest, QEMU};
use crate::turns::{Results, Turns};

const BOOT: Definition = Definition {
    key: "boot_first_output_ms",
    what: "from the start of the process to its guest's first character, with 512 MiB of memory",
    unit: "ms",
    better: Better::Less,
    limit: None,
    aims: &[Aim::OfEachPeer(1.0)],
};
const BOOT_WITH_DISK: Definition = Definition {
    key: "boot_with_disk_first_output_ms",
    what: "the same with a disk",
    aims: &[],
    ..BOOT
};
const PSS: Definition = Definition {
    key: "vmm_pss_kib",
    what: "the VMM's memory beyond the guest's 512 MiB, of what it shares its part only, with a vfio-user device",
    unit: "KiB",
    better: Better::Less,
    limit: None,
    aims: &[Aim::OfEachPeer(1.0)],
};
const THREADS: Definition = Definition {
    key: "vmm_threads",
    what: "the VMM's threads, with a vfio-user device",
    unit: "threads",
    better: Better::Less,
    limit: None,
    aims: &[],
};
const FDS: Definition = Definition {
    key: "vmm_fds",
    what: "the VMM's open files, with a vfio-user device",
    unit: "files",
    better: Better::Less,
    limit: None,
    aims: &[],
};

const MEBIBYTES: u32 = 512;

/// What one run of a program showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// To the first character, in milliseconds.
    pub(crate) start: f64,
    pss_kib: u64,
    threads: usize,
    fds: usize,
}

/// Every program boots the same guest, which sends one character to its serial port and then waits.
pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let kernel = tiny::guest(|code| {
        code.print(b'x')?;
        code.halt()
    })?;
    let mut guest = Guest {
        kernel: kernel.path(),
        mebibytes: MEBIBYTES,
        cpus: 1,
        devices: &[],
    };
    let results = with_peers(bench, &guest, Smallest::Microvm, |_, _| {})?;
    bench.add(results.measurement(&BOOT, |run| run.start));
    bench.failed(BOOT.key, results.failures);

    let image = NamedTempFile::new()?;
    image.as_file().set_len(1 << 30)?;
    let results = with_peers(bench, &guest, Smallest::Microvm, |name, command| {
        add_disk(name, command, image.path());
    })?;
    bench.add(results.measurement(&BOOT_WITH_DISK, |run| run.start));
    bench.failed(BOOT_WITH_DISK.key, results.failures);

    let device = DeviceThread::demo()?;
    let devices = [device.socket().to_owned()];
    guest.devices = &devices;
    let results = with_peers(bench, &guest, Smallest::Q35, |_, _| {})?;
    bench.add(results.measurement(&PSS, |run| run.pss_kib as f64));
    bench.add(results.measurement(&THREADS, |run| run.threads as f64));
    bench.add(results.measurement(&FDS, |run| run.fds as f64));
    bench.failed(PSS.key, results.failures);
    Ok(())
}

/// The smallest of QEMU's machines that will do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Smallest {
    Microvm,
    Q35,
}

/// Starts them all by turns, with what else each is to be told.
pub(crate) fn with_peers(
    bench: &Bench,
    guest: &Guest<'_>,
    smallest: Smallest,
    add: impl Fn(&str, &mut Command),
) -> anyhow::Result<Results<Figures>> {
    let programs = &bench.programs;
    let qemu = match smallest {
        Smallest::Microvm => programs.qemu_microvm(guest),
        Smallest::Q35 => programs.qemu(guest),
    };
    let turn = |name: &str, mut command: Command| {
        add(name, &mut command);
        move || run(&mut command)
    };
    let mut turns = Turns::new(turn("", programs.outrigger(guest)));
    if let Some(command) = programs.cloud_hypervisor(guest) {
        turns.peer(CLOUD_HYPERVISOR, turn(CLOUD_HYPERVISOR, command));
    }
    if let Some(command) = qemu {
        turns.peer(QEMU, turn(QEMU, command));
    }
    turns.take(bench.rounds(40))
}

/// A disk that is only read: one run's server may still have the image when the next one's starts.
fn add_disk(name: &str, command: &mut Command, image: &Path) {
    let image = image.display();
    if name == QEMU {
        let drive = format!("if=none,id=disk,format=raw,readonly=on,file={image}");
        command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"]);
    } else {
        command.args(["--disk", &format!("path={image},readonly=on")]);
    }
}

/// Starts a program, waits for its guest's first character, and looks at what it takes.
fn run(command: &mut Command) -> anyhow::Result<Figures> {
    let mut program = Running::start(command)?;
    let start = program.wait_for(b'x', None)? - program.started;
    let process = program.folder();
    let count = |folder| fs::read_dir(process.join(folder)).map(Iterator::count);
    Ok(Figures {
        start: start.as_secs_f64() * 1e3,
        pss_kib: pss_kib(&fs::read_to_string(process.join("smaps"))?),
        threads: count("task")?,
        fds: count("fd")?,
    })
}

/// Proportional memory in KiB, without the mapping of guest RAM: the one that is as large as it.
fn pss_kib(smaps: &str) -> u64 {
    let mut pss = 0;
    let mut is_ram = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let Ok(kib) = value.parse::<u64>() else {
            continue;
        };
        match key {
            "Size:" => is_ram = kib >= u64::from(MEBIBYTES) << 10,
            "Pss:" if !is_ram => pss += kib,
            _ => {}
        }
    }
    pss
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_the_vmms() {
        let smaps = "\
7f0000000000-7f0020000000 rw-s 00000000 00:01 1 /memfd:ram
Size:             524288 kB
Rss:                 100 kB
Pss:                  50 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0
Size:                  8 kB
Pss:                   4 kB
7f0020001000-7f0020002000 rw-p 00000000 00:00 0 [stack]
Size:                 12 kB
Pss:                   3 kB
";
        assert_eq!(pss_kib(smaps), 7);
    }
}
