//! What a guest checks about each test device. A check leaves the device as it found it, but for the memory decode
//! and bus master bits, which stay on.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest::{
    BAR_SIZES, CLASS_REVISION, DEVICE, DMA_ADDRESS, DMA_COMMAND, DMA_LENGTH, DMA_READ, DMA_SEED,
    DMA_STATUS, DMA_SUM, DMA_WRITE, INTX, MAGIC, MAGIC_VALUE, MAPPED, MSI_VECTORS, MSIX_VECTORS,
    PBA_OFFSET, RAISE, RAM_DATA, RAM_OFFSET, RAM_TRAPS, RESETS, SCRATCH, SERIAL_NUMBER, SUBSYSTEM,
    VENDOR, checksum, pattern,
};

use crate::dma::{Buffer, PAGE};
use crate::interrupts::{self, Cpu, VECTORS};
use crate::mapping::Mapping;
use crate::pci::{Bar, Device, regs};

/// Something to find out about a device.
pub(crate) struct Check {
    /// What the check's result is called.
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Device) -> Result<()>,
}

/// Every check, in the order in which they run.
pub(crate) const ALL: [Check; 12] = [
    Check {
        name: "config",
        run: config,
    },
    Check {
        name: "capabilities",
        run: capabilities,
    },
    Check {
        name: "bars",
        run: bars,
    },
    Check {
        name: "registers",
        run: registers,
    },
    Check {
        name: "ram",
        run: ram,
    },
    Check {
        name: "io",
        run: io,
    },
    Check {
        name: "decode",
        run: decode,
    },
    Check {
        name: "dma",
        run: dma,
    },
    Check {
        name: "msix",
        run: msix,
    },
    Check {
        name: "msix-mask",
        run: msix_mask,
    },
    Check {
        name: "msi",
        run: msi,
    },
    Check {
        name: "intx",
        run: intx,
    },
];

/// Identity, access widths and write masks of the header.
fn config(device: &Device) -> Result<()> {
    ensure!(
        device.config_len()? == 4096,
        "config space has {} bytes",
        device.config_len()?
    );
    ensure!(device.config32(0)? == u32::from(DEVICE) << 16 | u32::from(VENDOR));
    ensure!(device.config32(regs::CLASS_REVISION)? == CLASS_REVISION);
    let subsystem = u32::from(SUBSYSTEM) << 16 | u32::from(VENDOR);
    ensure!(device.config32(regs::SUBSYSTEM_VENDOR_ID)? == subsystem);
    ensure!(
        device.config8(regs::INTERRUPT_PIN)? == 1,
        "the interrupt pin is not INTA"
    );

    for offset in (0..0x100).step_by(4) {
        let dword = device.config::<4>(offset)?;
        let words = [device.config::<2>(offset)?, device.config::<2>(offset + 2)?];
        let [a, b, c, d] = [0, 1, 2, 3].map(|byte| device.config8(offset + byte));
        let bytes = [a?, b?, c?, d?];
        ensure!(
            words.concat() == dword && bytes == dword,
            "{offset:#x}: {dword:x?}, {words:x?}, {bytes:x?}"
        );
    }

    device.set_config(0, &[0xff; 4])?;
    device.set_config(regs::CLASS_REVISION, &[0xff; 4])?;
    ensure!(
        device.config32(0)? == u32::from(DEVICE) << 16 | u32::from(VENDOR),
        "the ids can be overwritten"
    );
    ensure!(
        device.config32(regs::CLASS_REVISION)? == CLASS_REVISION,
        "the class can be overwritten"
    );

    let line = device.config8(regs::INTERRUPT_LINE)?;
    device.set_config(regs::INTERRUPT_LINE, &[0x5a])?;
    ensure!(
        device.config8(regs::INTERRUPT_LINE)? == 0x5a,
        "the interrupt line register keeps nothing"
    );
    device.set_config(regs::INTERRUPT_LINE, &[line])
}

/// Both capability lists, and what is in them.
fn capabilities(device: &Device) -> Result<()> {
    let ids = device
        .capabilities()?
        .iter()
        .map(|found| found.0)
        .collect::<Vec<_>>();
    let expected = [regs::CAP_PM, regs::CAP_MSI, regs::CAP_EXP, regs::CAP_MSIX];
    ensure!(ids == expected, "the capabilities are {ids:02x?}");

    let express = device.capability(regs::CAP_EXP)?;
    let kind = device.config16(express + 2)? >> 4 & 0xf;
    ensure!(
        kind == 9,
        "on bus 0 it must be a root complex integrated endpoint (9) and is a {kind}"
    );
    ensure!(
        device.config32(express + 0x0c)? == 0,
        "an integrated endpoint has no link"
    );

    let msix = device.capability(regs::CAP_MSIX)?;
    ensure!(
        device.config16(msix + 2)? & 0x7ff == MSIX_VECTORS - 1,
        "wrong number of MSI-X vectors"
    );
    ensure!(
        device.config32(msix + 4)? == 1,
        "the MSI-X table is elsewhere"
    );
    ensure!(
        u64::from(device.config32(msix + 8)?) == PBA_OFFSET | 1,
        "the pending bits are elsewhere"
    );

    let ids = device
        .extended_capabilities()?
        .iter()
        .map(|found| found.0)
        .collect::<Vec<_>>();
    ensure!(
        ids == [regs::EXT_CAP_DSN, regs::EXT_CAP_VENDOR],
        "the extended capabilities are {ids:04x?}"
    );
    let number = [device.config32(0x104)?, device.config32(0x108)?];
    ensure!(number == SERIAL_NUMBER, "the serial number is {number:x?}");
    Ok(())
}

/// Kind, size, placement and sizing of the BARs.
fn bars(device: &Device) -> Result<()> {
    let kinds = [
        Bar::MEMORY,
        Bar::MEMORY,
        Bar::MEMORY | Bar::MEMORY_64 | Bar::PREFETCH,
        0,
        Bar::IO,
        0,
    ];
    let mask = Bar::IO | Bar::MEMORY | Bar::MEMORY_64 | Bar::PREFETCH;
    let bars = device.bars()?;
    for (index, (bar, (kind, size))) in bars
        .iter()
        .zip(kinds.into_iter().zip(BAR_SIZES))
        .enumerate()
    {
        ensure!(
            bar.flags & mask == kind && bar.size == size,
            "BAR {index} is {bar:x?}"
        );
        ensure!(
            size == 0 || bar.start != 0 && bar.start.is_multiple_of(size),
            "BAR {index} is badly placed: {bar:x?}"
        );
    }

    device.command(0, regs::COMMAND_MEMORY | regs::COMMAND_IO)?;
    for (index, masked) in [
        (0, 0xffff_f000),
        (2, 0xffff_000c),
        (3, 0xffff_ffff),
        (4, 0xffff_ffe1),
        (5, 0),
    ] {
        let register = regs::BASE_ADDRESS_0 + 4 * index;
        let saved = device.config::<4>(register)?;
        device.set_config(register, &[0xff; 4])?;
        let sized = device.config32(register)?;
        device.set_config(register, &saved)?;
        // Of an I/O BAR's upper half a device may implement nothing.
        ensure!(
            sized == masked || index == 4 && sized == masked & 0xffff,
            "BAR {index} sizes as {sized:#x}"
        );
        ensure!(
            device.config::<4>(register)? == saved,
            "BAR {index} forgot its address"
        );
    }
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_IO, 0)
}

/// Trapped registers at every width.
fn registers(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, 0)?;
    let registers = device.map(0)?;
    ensure!(
        registers.read::<u32>(at(MAGIC)) == MAGIC_VALUE,
        "BAR 0 does not start with the device's magic"
    );
    println!("FACT resets {}", registers.read::<u32>(at(RESETS)));

    let scratch = at(SCRATCH);
    let value = 0x8899_aabb_ccdd_eeff_u64;
    registers.write(scratch, value);
    ensure!(
        registers.read::<u64>(scratch) == value,
        "a quadword does not come back"
    );
    for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
        ensure!(
            registers.read::<u8>(scratch + index) == byte,
            "byte {index} reads wrong"
        );
    }
    ensure!(
        registers.read::<u16>(scratch + 2) == 0xccdd
            && registers.read::<u32>(scratch + 4) == 0x8899_aabb
    );
    registers.write(scratch + 3, 0x11_u8);
    registers.write(scratch + 6, 0x2233_u16);
    ensure!(
        registers.read::<u64>(scratch) == 0x2233_aabb_11dd_eeff,
        "a partial write went astray"
    );
    registers.write(scratch, 0_u64);
    Ok(())
}

/// BAR 2, whose middle is mapped and whose rest is trapped.
fn ram(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, 0)?;
    let (registers, ram) = (device.map(0)?, device.map(2)?);
    let seen = |offset: usize| -> Result<u32> {
        registers.write(at(RAM_OFFSET), u32::try_from(offset)?);
        Ok(registers.read::<u32>(at(RAM_DATA)))
    };
    let traps = || registers.read::<u32>(at(RAM_TRAPS));
    let (start, end) = (at(MAPPED.start), at(MAPPED.end));

    let before = traps();
    for offset in (start..end)
        .step_by(4)
        .filter(|offset| offset % 256 == 0 || offset + 4 == end)
    {
        ram.write(offset, !u32::try_from(offset)?);
    }
    for offset in [start, start + PAGE, end - PAGE, end - 4] {
        let expected = !u32::try_from(offset)?;
        ensure!(
            ram.read::<u32>(offset) == expected,
            "{offset:#x} of the mapped part does not come back"
        );
        ensure!(
            seen(offset)? == expected,
            "the device does not see {offset:#x} of the mapped part"
        );
    }
    ensure!(
        traps() == before,
        "the mapped part is trapped: {} accesses",
        traps() - before
    );

    for (count, offset) in (1..).zip([0, start - 4, end, at(BAR_SIZES[2]) - 4]) {
        ram.write(offset, 0x600d_0000 | u32::try_from(offset)?);
        ensure!(
            seen(offset)? == 0x600d_0000 | u32::try_from(offset)?,
            "{offset:#x} of the trapped part is not stored"
        );
        ensure!(
            ram.read::<u32>(offset) == seen(offset)?,
            "{offset:#x} of the trapped part does not come back"
        );
        ensure!(traps() == before + 2 * count, "{offset:#x} is not trapped");
    }
    Ok(())
}

/// The I/O BAR, at every width.
fn io(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_IO, 0)?;
    let ports = device.resource(4)?;
    ports.write_all_at(&0xcafe_f00d_u32.to_le_bytes(), 0)?;
    ports.write_all_at(&0x1234_u16.to_le_bytes(), 30)?;
    ports.write_all_at(&[0x56], 29)?;
    ensure!(
        port(&ports, 0)? == 0xcafe_f00d_u32.to_le_bytes(),
        "a dword does not come back"
    );
    ensure!(
        port(&ports, 2)? == 0xcafe_u16.to_le_bytes(),
        "a word does not come back"
    );
    ensure!(port::<1>(&ports, 3)? == [0xca], "a byte does not come back");
    ensure!(
        port(&ports, 28)? == [0, 0x56, 0x34, 0x12],
        "the last ports do not come back"
    );
    Ok(())
}

fn port<const N: usize>(ports: &File, offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    ports.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Memory decode off and on, and two BARs that change places: trapped and mapped memory follow.
fn decode(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, 0)?;
    let (registers, table, ram) = (device.map(0)?, device.map(1)?, device.map(2)?);
    let mapped = at(MAPPED.start);
    ram.write(mapped, 0x0dec_0de0_u32);

    device.command(0, regs::COMMAND_MEMORY)?;
    ensure!(
        registers.read::<u32>(at(MAGIC)) == u32::MAX,
        "the registers answer with memory decode off"
    );
    ensure!(
        ram.read::<u32>(mapped) == u32::MAX,
        "the mapped memory answers with memory decode off"
    );
    ram.write(mapped, 0_u32);

    let [first, second] = [0, 4].map(|offset| device.config::<4>(regs::BASE_ADDRESS_0 + offset));
    let (first, second) = (first?, second?);
    device.set_config(regs::BASE_ADDRESS_0, &second)?;
    device.set_config(regs::BASE_ADDRESS_0 + 4, &first)?;
    device.command(regs::COMMAND_MEMORY, 0)?;
    let moved = table.read::<u32>(at(MAGIC));
    device.command(0, regs::COMMAND_MEMORY)?;
    device.set_config(regs::BASE_ADDRESS_0, &first)?;
    device.set_config(regs::BASE_ADDRESS_0 + 4, &second)?;
    device.command(regs::COMMAND_MEMORY, 0)?;

    ensure!(
        moved == MAGIC_VALUE,
        "BAR 0 did not answer at its new address"
    );
    ensure!(
        registers.read::<u32>(at(MAGIC)) == MAGIC_VALUE,
        "BAR 0 does not answer at its old address again"
    );
    ensure!(
        ram.read::<u32>(mapped) == 0x0dec_0de0,
        "the mapped memory is not what it was"
    );
    Ok(())
}

/// The device writes and reads guest memory, wherever it is.
fn dma(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
    let registers = device.map(0)?;
    let transfer = |command: u32, address: u64, length: usize, seed: u32| -> Result<bool> {
        registers.write(at(DMA_ADDRESS), address);
        registers.write(at(DMA_LENGTH), u32::try_from(length)?);
        registers.write(at(DMA_SEED), seed);
        registers.write(at(DMA_COMMAND), command);
        Ok(registers.read::<u32>(at(DMA_STATUS)) == 0)
    };
    let bytes = |seed: u32, len: usize| {
        (0..)
            .map(|index| pattern(seed, index))
            .take(len)
            .collect::<Vec<_>>()
    };

    let buffer = Buffer::new(64)?;
    for (page, (address, seed)) in buffer.pages().iter().zip(1..).enumerate() {
        buffer.fill(page, |_| 0xee);
        ensure!(
            transfer(DMA_WRITE, *address, PAGE, seed)?,
            "the device could not write to {address:#x}"
        );
        ensure!(
            buffer.contents(page) == bytes(seed, PAGE),
            "not what the device wrote to {address:#x}"
        );
        buffer.fill(page, |offset| {
            offset.to_le_bytes()[0] ^ address.to_le_bytes()[1]
        });
        ensure!(
            transfer(DMA_READ, *address, PAGE, 0)?,
            "the device could not read {address:#x}"
        );
        let sum = registers.read::<u32>(at(DMA_SUM));
        ensure!(
            sum == checksum(&buffer.contents(page)),
            "the device read something else at {address:#x}"
        );
    }

    let address = buffer.pages().first().context("no pages")?;
    buffer.fill(0, |_| 0xee);
    ensure!(
        transfer(DMA_WRITE, address + 17, 1001, 99)?,
        "the device could not write 1001 bytes"
    );
    let around = [
        vec![0xee; 17],
        bytes(99, 1001),
        vec![0xee; PAGE - 17 - 1001],
    ]
    .concat();
    ensure!(
        buffer.contents(0) == around,
        "1001 unaligned bytes went wrong"
    );

    let registers_at = device.bars()?[0].start;
    for (what, address) in [("nowhere", 1 << 46), ("a BAR", registers_at)] {
        ensure!(
            !transfer(DMA_WRITE, address, 4, 0)?,
            "the device says it wrote to {what}"
        );
    }
    device.command(0, regs::COMMAND_MASTER)?;
    ensure!(
        !transfer(DMA_WRITE, *address, 4, 0)?,
        "the device does DMA without being bus master"
    );
    device.command(regs::COMMAND_MASTER, 0)?;

    let high = buffer
        .pages()
        .iter()
        .filter(|page| **page >= 1 << 32)
        .count();
    println!("FACT dma-pages-above-4g {high}");
    Ok(())
}

/// A device's MSI-X table and pending bits, enabled with every vector masked.
struct Msix<'a> {
    device: &'a Device,
    control: u16,
    registers: Mapping,
    table: Mapping,
}

impl<'a> Msix<'a> {
    const ENABLE: u16 = 1 << 15;
    const FUNCTION_MASK: u16 = 1 << 14;

    fn enable(device: &'a Device) -> Result<Self> {
        device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
        let control = device.capability(regs::CAP_MSIX)? + 2;
        let msix = Self {
            device,
            control,
            registers: device.map(0)?,
            table: device.map(1)?,
        };
        msix.set_control(Self::ENABLE)?;
        Ok(msix)
    }

    fn set_control(&self, bits: u16) -> Result<()> {
        self.device.set_config(self.control, &bits.to_le_bytes())
    }

    fn program(&self, entry: u16, cpu: Cpu, vector: u8) {
        let at = 16 * usize::from(entry);
        self.table.write(at, interrupts::message_address(cpu));
        self.table.write(at + 4, 0_u32);
        self.table.write(at + 8, u32::from(vector));
    }

    fn mask(&self, entry: u16, masked: bool) {
        self.table
            .write(16 * usize::from(entry) + 12, u32::from(masked));
    }

    fn raise(&self, entry: u16) {
        self.registers.write(at(RAISE), u32::from(entry));
    }

    fn pending(&self) -> u64 {
        self.table.read(at(PBA_OFFSET))
    }

    fn await_pending(&self, bits: u64) -> Result<()> {
        interrupts::wait_for("a pending bit", || Ok(self.pending() == bits))
    }
}

impl Drop for Msix<'_> {
    fn drop(&mut self) {
        (0..MSIX_VECTORS).for_each(|entry| self.mask(entry, true));
        // Nothing is left to do about an error, and the next check meets it.
        let _ = self.set_control(0);
    }
}

/// Every vector at several CPUs, counted one by one.
fn msix(device: &Device) -> Result<()> {
    let cpus = interrupts::cpus()?;
    let msix = Msix::enable(device)?;
    let mut expected = interrupts::counts()?;
    for round in 0..2 {
        let targets = cpus.iter().cycle().skip(round);
        let vectors = VECTORS.iter().cycle().skip(round);
        for (entry, (cpu, (vector, _))) in (0..MSIX_VECTORS).zip(targets.zip(vectors)) {
            msix.mask(entry, true);
            msix.program(entry, *cpu, *vector);
            msix.mask(entry, false);
            for _ in 0..=entry % 3 {
                msix.raise(entry);
                *expected.entry((*vector, cpu.number)).or_default() += 1;
                interrupts::expect(&expected).with_context(|| format!("MSI-X vector {entry}"))?;
            }
        }
    }
    Ok(())
}

/// Masks and pending bits: nothing is lost, nothing arrives twice.
fn msix_mask(device: &Device) -> Result<()> {
    let cpu = *interrupts::cpus()?.last().context("no CPU")?;
    let msix = Msix::enable(device)?;
    let mut expected = interrupts::counts()?;
    // An interrupt that must not come is not waited for. It would come before the one of vector 3 that is sent after it.
    let mut settle = |deliveries: &[u8]| -> Result<()> {
        msix.raise(3);
        for vector in [VECTORS[0].0].iter().chain(deliveries) {
            *expected.entry((*vector, cpu.number)).or_default() += 1;
        }
        interrupts::expect(&expected)
    };
    for entry in 0..4 {
        msix.program(entry, cpu, VECTORS[[1, 2, 1, 0][usize::from(entry)]].0);
    }
    msix.mask(3, false);
    settle(&[]).context("without a mask")?;
    ensure!(
        msix.pending() == 0,
        "bits are pending at the start: {:#x}",
        msix.pending()
    );

    // A device is given a vector when that is first unmasked.
    msix.mask(0, false);
    msix.mask(0, true);
    msix.raise(0);
    msix.await_pending(1)?;
    msix.raise(0);
    settle(&[]).context("masked")?;
    msix.mask(0, false);
    settle(&[VECTORS[1].0]).context("unmasked: one interrupt, however often the device asked")?;
    msix.await_pending(0)?;
    msix.mask(0, true);
    msix.mask(0, false);
    settle(&[]).context("masked and unmasked again: the interrupt came back")?;

    for entry in 1..3 {
        msix.mask(entry, false);
    }
    msix.set_control(Msix::ENABLE | Msix::FUNCTION_MASK)?;
    msix.raise(1);
    msix.raise(2);
    msix.await_pending(0b110)?;
    msix.set_control(Msix::ENABLE)?;
    settle(&[VECTORS[1].0, VECTORS[2].0]).context("function mask taken away")?;
    msix.await_pending(0)?;

    msix.mask(1, true);
    msix.raise(1);
    msix.await_pending(0b10)?;
    msix.program(1, cpu, VECTORS[1].0);
    msix.mask(1, false);
    settle(&[VECTORS[1].0]).context("the message was changed while it was pending")
}

/// Several messages of MSI, and its mask bits.
fn msi(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY | regs::COMMAND_MASTER, 0)?;
    let capability = device.capability(regs::CAP_MSI)?;
    let result = count_msi(device, capability);
    device.set_config(capability + 2, &[0; 2])?;
    result
}

fn count_msi(device: &Device, capability: u16) -> Result<()> {
    const ENABLE: u16 = 1;
    const FOUR_MESSAGES: u16 = 2 << 4;

    let control = device.config16(capability + 2)?;
    ensure!(
        control & 0x18e == 0x184,
        "not {MSI_VECTORS} messages, 64 bits, maskable: {control:#x}"
    );
    let (mask, pending) = (capability + 0x10, capability + 0x14);

    let registers = device.map(0)?;
    let cpu = *interrupts::cpus()?.last().context("no CPU")?;
    let mut expected = interrupts::counts()?;
    device.set_config(
        capability + 4,
        &interrupts::message_address(cpu).to_le_bytes(),
    )?;
    device.set_config(capability + 8, &[0; 4])?;
    device.set_config(capability + 0x0c, &u16::from(VECTORS[0].0).to_le_bytes())?;
    device.set_config(mask, &[0; 4])?;
    device.set_config(capability + 2, &(ENABLE | FOUR_MESSAGES).to_le_bytes())?;
    for (message, (vector, _)) in (0_u32..).zip(VECTORS) {
        for _ in 0..=message {
            registers.write(at(RAISE), message);
            *expected.entry((vector, cpu.number)).or_default() += 1;
            interrupts::expect(&expected).with_context(|| format!("message {message}"))?;
        }
    }

    device.set_config(mask, &0b10_u32.to_le_bytes())?;
    registers.write(at(RAISE), 1_u32);
    interrupts::wait_for("a pending bit", || Ok(device.config32(pending)? == 0b10))?;
    interrupts::expect(&expected).context("masked")?;
    device.set_config(mask, &[0; 4])?;
    *expected.entry((VECTORS[1].0, cpu.number)).or_default() += 1;
    interrupts::expect(&expected).context("unmasked")
}

/// The wired interrupt, through Linux's own driver for devices that it knows nothing about.
fn intx(device: &Device) -> Result<()> {
    device.command(regs::COMMAND_MEMORY, regs::COMMAND_INTX_DISABLE)?;
    device.bind("uio_pci_generic")?;
    let result = count_intx(device);
    device.unbind()?;
    result
}

fn count_intx(device: &Device) -> Result<()> {
    let registers = device.map(0)?;
    let mut uio = File::open(format!("/dev/{}", device.uio()?))?;
    let (sender, events) = mpsc::channel();
    // Ends with the program: nothing but an interrupt can end the read.
    thread::spawn(move || {
        let mut count = [0; 4];
        while uio.read_exact(&mut count).is_ok() && sender.send(u32::from_le_bytes(count)).is_ok() {
        }
    });
    let mut next = 1;
    let mut expect = |when: &str| -> Result<()> {
        let count = events
            .recv_timeout(Duration::from_secs(10))
            .with_context(|| format!("no interrupt {when}"))?;
        ensure!(count == next, "{count} interrupts and not {next} {when}");
        next += 1;
        Ok(())
    };

    // The driver disables INTx when it gets an interrupt, and it is for us to enable it again.
    let enable = || device.command(0, regs::COMMAND_INTX_DISABLE);
    let line = |level: u32| registers.write(at(INTX), level);
    for _ in 0..3 {
        line(1);
        expect("when the line rose")?;
        line(0);
        enable()?;
    }
    line(1);
    expect("when the line rose for the last time")?;
    enable()?;
    expect("while the line was high")?;
    line(0);
    enable()?;
    ensure!(
        events.try_recv().is_err(),
        "an interrupt while the line was low"
    );
    Ok(())
}

/// A register's place in a mapping.
fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
