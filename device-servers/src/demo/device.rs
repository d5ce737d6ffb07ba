//! The device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vfio_user_server::{Bar, Description, Device, Host, Ids, Migration, MsixTable, Registers};

use super::registers::{
    BELLS, DMA_BUSY, DMA_LATER, DMA_READ, DMA_WRITE, MAGIC, Values, offset as reg,
};
use super::state::{Loading, Saving};
use super::worker::Worker;

/// Vendor id; nobody's in the public list.
const VENDOR: u16 = 0x4f52;

/// Bytes in BAR 2, and which of them can be mapped.
const RAM_SIZE: u64 = 0x1_0000;
const MAPPED: std::ops::Range<u64> = 0x4000..0xc000;

/// Bytes in BAR 4.
pub(super) const PORTS: usize = 0x20;

/// Longest delay on request.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// The demo device. Its module says what it does.
#[derive(Debug)]
pub struct Demo {
    pub(super) host: Host,
    pub(super) worker: Worker,
    pub(super) ram: Arc<File>,
    pub(super) ports: [u8; PORTS],
    vectors: u16,
    pub(super) saving: Saving,
    pub(super) loading: Loading,
}

/// What the device is.
pub(super) fn description(ram: &Arc<File>, vectors: u16) -> Description {
    let description = Description::new(Ids {
        vendor: VENDOR,
        device: 0x0001,
        subsystem_vendor: VENDOR,
        subsystem: 0x0002,
        revision: 3,
        class: 0xff_00_00,
    })
    .bar(0, Bar::memory32(0x1000))
    .bar(1, Bar::memory32(0x1000))
    .bar(
        2,
        Bar::memory64(RAM_SIZE)
            .prefetchable()
            .backed_by(Arc::clone(ram))
            .mappable(MAPPED),
    )
    .bar(4, Bar::io(PORTS as u64))
    .intx()
    .power_management()
    .msi(4)
    .express()
    .msix(MsixTable {
        vectors,
        table_bar: 1,
        table_offset: 0,
        pending_bar: 1,
        pending_offset: 0x800,
    })
    .serial_number(0x4f75_7472_6967_6765)
    .vendor_specific(1, 1, &[0, 0, 0, 0, 0x78, 0x56, 0x34, 0x12], &[0xff; 4]);
    BELLS.into_iter().fold(description, Description::doorbell)
}

/// The memory of BAR 2.
pub(super) fn ram() -> io::Result<Arc<File>> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let ram = File::from(memfd_create("demo", flags)?);
    ram.set_len(RAM_SIZE)?;
    fcntl_add_seals(&ram, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(Arc::new(ram))
}

impl Demo {
    pub(super) fn new(host: Host, ram: Arc<File>, vectors: u16) -> Self {
        Self {
            worker: Worker::new(host.clone()),
            host,
            ram,
            ports: [0; PORTS],
            vectors,
            saving: Saving::default(),
            loading: Loading::default(),
        }
    }

    /// Does a transfer now, or lets the worker do it.
    fn command(&mut self, command: u32) -> io::Result<()> {
        if matches!(command & !DMA_LATER, DMA_READ | DMA_WRITE) && command & DMA_LATER != 0 {
            return self.worker.order(|values| {
                values.pending = command;
                values.dma_status = DMA_BUSY;
            });
        }
        let transfer = self.worker.with(|values| values.transfer);
        let result = Worker::transfer(&self.host, &transfer, command);
        self.worker.with(|values| values.finish(result));
        Ok(())
    }

    /// The four bytes of BAR 2 that `RAM_DATA` shows.
    fn ram_data(&self, values: &Values) -> u32 {
        let mut data = [0; 4];
        let read = self.ram.read_exact_at(&mut data, values.ram_offset.into());
        read.map_or(0, |()| u32::from_le_bytes(data))
    }

    fn trap(&self) {
        self.worker
            .with(|values| values.ram_traps = values.ram_traps.wrapping_add(1));
    }
}

impl Device for Demo {
    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match bar {
            0 => self.read_registers(offset, data),
            2 => {
                self.trap();
                self.ram.read_exact_at(data, offset)
            }
            4 => {
                let ports = at(offset).and_then(|start| self.ports.get(start..start + data.len()));
                data.copy_from_slice(ports.ok_or(io::ErrorKind::InvalidInput)?);
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        match bar {
            0 => self.write_registers(offset, data),
            2 => {
                self.trap();
                self.ram.write_all_at(data, offset)
            }
            4 => {
                let start = at(offset);
                let ports = start.and_then(|start| self.ports.get_mut(start..start + data.len()));
                ports
                    .ok_or(io::ErrorKind::InvalidInput)?
                    .copy_from_slice(data);
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn reset(&mut self) {
        wait(self.worker.with(|values| values.reset_delay));
        self.worker.interrupt(Values::reset);
        self.ports = [0; PORTS];
    }

    fn doorbell(&mut self, doorbell: usize) {
        self.worker.with(|values| {
            if let Some(rung) = values.rung.get_mut(doorbell) {
                *rung = rung.wrapping_add(1);
            }
        });
    }

    fn stop(&mut self) -> io::Result<()> {
        self.fail_on_request()?;
        self.worker.stop();
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        self.fail_on_request()?;
        self.worker.start()
    }

    fn migration(&mut self) -> Migration<'_> {
        Migration::Stream(self)
    }
}

impl Registers for Demo {
    fn register(&mut self, offset: u64) -> io::Result<u32> {
        let values = self.worker.with(|values| values.clone());
        let Values {
            scratch: [scratch, scratch_high],
            fault: [fault, fault_data],
            delay: [delay, delay_data],
            ref transfer,
            ref writer,
            ..
        } = values;
        let [address, address_high] = transfer.address;
        Ok(match offset {
            reg::MAGIC => MAGIC,
            reg::RESETS => values.resets,
            reg::SCRATCH => scratch,
            reg::SCRATCH_HIGH => scratch_high,
            reg::INTX => values.intx,
            reg::DMA_ADDRESS => address,
            reg::DMA_ADDRESS_HIGH => address_high,
            reg::DMA_LENGTH => transfer.length,
            reg::DMA_SEED => transfer.seed,
            reg::DMA_STATUS => values.dma_status,
            reg::DMA_SUM => values.dma_sum,
            reg::RAM_OFFSET => values.ram_offset,
            reg::RAM_DATA => self.ram_data(&values),
            reg::RAM_TRAPS => values.ram_traps,
            reg::VECTORS => self.vectors.into(),
            reg::DOORBELLS => u32::try_from(BELLS.len()).unwrap_or(0),
            reg::FAULT => fault,
            reg::FAULT_DATA => {
                refuse(fault)?;
                fault_data
            }
            reg::DELAY => delay,
            reg::DELAY_DATA => {
                wait(delay);
                delay_data
            }
            reg::RESET_DELAY => values.reset_delay,
            reg::STATE_FAULT => values.state_fault,
            reg::STATE_SIZE => values.state_size,
            reg::EARLY_SIZE => values.early_size,
            reg::WRITER_PERIOD => writer.period,
            reg::WRITER_COUNT => writer.count,
            reg::WRITER_ERRORS => writer.errors,
            offset => bell(offset)
                .and_then(|bell| values.rung.get(bell))
                .copied()
                .unwrap_or(0),
        })
    }

    fn set_register(&mut self, offset: u64, value: u32) -> io::Result<()> {
        match offset {
            reg::RAISE => {
                // There are no vectors with numbers so high.
                self.host
                    .interrupts
                    .trigger(u16::try_from(value).unwrap_or(u16::MAX));
                return Ok(());
            }
            reg::INTX => self.host.interrupts.set_intx(value & 1 != 0),
            reg::DMA_COMMAND => return self.command(value),
            reg::WRITER_PERIOD => {
                return self.worker.order(|values| values.writer.period = value);
            }
            reg::FAULT_DATA => refuse(self.worker.with(|values| values.fault[0]))?,
            reg::DELAY_DATA => wait(self.worker.with(|values| values.delay[0])),
            _ => {}
        }
        self.worker.with(|values| {
            if let Some(register) = values.kept(offset) {
                *register = value;
            }
        });
        Ok(())
    }
}

impl Values {
    /// A register that keeps what is written to it.
    fn kept(&mut self, offset: u64) -> Option<&mut u32> {
        Some(match offset {
            reg::SCRATCH => &mut self.scratch[0],
            reg::SCRATCH_HIGH => &mut self.scratch[1],
            reg::INTX => &mut self.intx,
            reg::DMA_ADDRESS => &mut self.transfer.address[0],
            reg::DMA_ADDRESS_HIGH => &mut self.transfer.address[1],
            reg::DMA_LENGTH => &mut self.transfer.length,
            reg::DMA_SEED => &mut self.transfer.seed,
            reg::RAM_OFFSET => &mut self.ram_offset,
            reg::FAULT => &mut self.fault[0],
            reg::FAULT_DATA => &mut self.fault[1],
            reg::DELAY => &mut self.delay[0],
            reg::DELAY_DATA => &mut self.delay[1],
            reg::RESET_DELAY => &mut self.reset_delay,
            reg::STATE_FAULT => &mut self.state_fault,
            reg::STATE_SIZE => &mut self.state_size,
            reg::EARLY_SIZE => &mut self.early_size,
            reg::WRITER_COUNT => &mut self.writer.count,
            offset => self.rung.get_mut(bell(offset)?)?,
        })
    }
}

impl Demo {
    /// Fails if `STATE_FAULT` says so.
    pub(super) fn fail_on_request(&self) -> io::Result<()> {
        refuse(self.worker.with(|values| values.state_fault))
    }
}

/// The doorbell whose `RUNG` is at an offset.
fn bell(offset: u64) -> Option<usize> {
    at(offset.checked_sub(reg::RUNG)? / 4)
}

fn at(offset: u64) -> Option<usize> {
    usize::try_from(offset).ok()
}

/// Refuses an access with an errno, unless it is 0.
fn refuse(errno: u32) -> io::Result<()> {
    match i32::try_from(errno) {
        Ok(0) => Ok(()),
        Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
        Err(_) => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Waits for so many milliseconds.
fn wait(milliseconds: u32) {
    if milliseconds != 0 {
        thread::sleep(Duration::from_millis(milliseconds.into()).min(MAX_DELAY));
    }
}
