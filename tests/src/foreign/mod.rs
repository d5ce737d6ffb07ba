//! A device behind a vfio-user server that nobody here wrote: that of the crate `vfio_user`.
//!
//! Client and server of our own could agree on the same mistake. A VMM that works with this one, too, does not. It is a
//! simple relative of the demo device, with the same registers as far as it has them, and without MSI and doorbells.

mod config;
mod dma;
mod interrupts;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use guest::{
    BAR_SIZES, DMA_ADDRESS, DMA_COMMAND, DMA_LENGTH, DMA_MAX, DMA_READ, DMA_SEED, DMA_STATUS,
    DMA_SUM, DMA_WRITE, INTX, MAGIC, MAGIC_VALUE, MAPPED, RAISE, RAM_DATA, RAM_OFFSET, RAM_TRAPS,
    SCRATCH,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tempfile::TempDir;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, Server, ServerBackend, ServerRegion, SparseArea};

use self::config::ConfigSpace;
use self::dma::Dma;
use self::interrupts::Interrupts;

/// MSI-X vectors.
const VECTORS: u16 = 8;

/// A server with the device, for one client. It ends with that, for it cannot be stopped.
#[derive(Debug)]
pub struct ForeignDevice {
    socket: PathBuf,
    // Removed with the socket in it on drop.
    _folder: TempDir,
}

impl ForeignDevice {
    /// Starts it.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("device.sock");
        let mut device = Device::new()?;
        let server = Server::new(&socket, true, interrupts::info(), device.regions())?;
        thread::spawn(move || server.run(&mut device));
        Ok(Self {
            socket,
            _folder: folder,
        })
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

#[derive(Debug)]
struct Device {
    config: ConfigSpace,
    interrupts: Interrupts,
    dma: Dma,
    registers: Registers,
    ram: File,
    ports: [u8; 32],
    ram_traps: u32,
}

/// The registers that merely keep what is written to them.
#[derive(Debug, Default)]
struct Registers {
    scratch: [u32; 2],
    dma_address: [u32; 2],
    dma_length: u32,
    dma_seed: u32,
    dma_status: u32,
    dma_sum: u32,
    ram_offset: u32,
}

impl Device {
    fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let ram = File::from(memfd_create("foreign", flags)?);
        ram.set_len(BAR_SIZES[2])?;
        fcntl_add_seals(&ram, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self {
            config: ConfigSpace::new(),
            interrupts: Interrupts::default(),
            dma: Dma::default(),
            registers: Registers::default(),
            ram,
            ports: [0; 32],
            ram_traps: 0,
        })
    }

    /// What the client is told about the regions.
    fn regions(&self) -> Vec<ServerRegion> {
        let others = [0, config::SIZE as u64, 0]; // ROM, config space, VGA
        let access = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        let region = |(index, size)| ServerRegion {
            region_info: vfio_region_info {
                argsz: size_of::<vfio_region_info>().try_into().unwrap_or_default(),
                flags: if size == 0 { 0 } else { access },
                index,
                size,
                ..Default::default()
            },
            sparse_areas: Vec::new(),
            mmap_fd: None,
        };
        let sizes = BAR_SIZES.into_iter().chain(others);
        let mut regions: Vec<_> = (0..).zip(sizes).map(region).collect();
        if let Some(ram) = regions.get_mut(2) {
            let area = vfio_region_sparse_mmap_area {
                offset: MAPPED.start,
                size: MAPPED.end - MAPPED.start,
            };
            ram.region_info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
            ram.sparse_areas.push(SparseArea { area });
            ram.mmap_fd = Some(self.ram.as_raw_fd());
        }
        regions
    }

    fn register(&self, offset: u64) -> u32 {
        let registers = &self.registers;
        match offset {
            MAGIC => MAGIC_VALUE,
            SCRATCH => registers.scratch[0],
            0x0c => registers.scratch[1],
            INTX => self.interrupts.level().into(),
            DMA_ADDRESS => registers.dma_address[0],
            0x1c => registers.dma_address[1],
            DMA_LENGTH => registers.dma_length,
            DMA_SEED => registers.dma_seed,
            DMA_STATUS => registers.dma_status,
            DMA_SUM => registers.dma_sum,
            RAM_OFFSET => registers.ram_offset,
            RAM_DATA => {
                let mut data = [0; 4];
                match self
                    .ram
                    .read_exact_at(&mut data, registers.ram_offset.into())
                {
                    Ok(()) => u32::from_le_bytes(data),
                    Err(_) => 0,
                }
            }
            RAM_TRAPS => self.ram_traps,
            guest::VECTORS => VECTORS.into(),
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) -> io::Result<()> {
        if offset == DMA_COMMAND {
            self.registers.dma_status = self.transfer(value).is_none().into();
        }
        let registers = &mut self.registers;
        match offset {
            SCRATCH => registers.scratch[0] = value,
            0x0c => registers.scratch[1] = value,
            RAISE => return self.interrupts.raise(value),
            INTX => {
                self.config.set_interrupt_status(value & 1 != 0);
                return self.interrupts.set_level(&self.config, value & 1 != 0);
            }
            DMA_ADDRESS => registers.dma_address[0] = value,
            0x1c => registers.dma_address[1] = value,
            DMA_LENGTH => registers.dma_length = value,
            DMA_SEED => registers.dma_seed = value,
            RAM_OFFSET => registers.ram_offset = value,
            _ => {}
        }
        Ok(())
    }

    /// Does a DMA transfer; None when it is refused.
    fn transfer(&mut self, command: u32) -> Option<()> {
        let registers = &mut self.registers;
        let [low, high] = registers.dma_address.map(u64::from);
        let (address, length) = (high << 32 | low, registers.dma_length);
        if !self.config.is_bus_master() || length > DMA_MAX {
            return None;
        }
        match command {
            DMA_WRITE => {
                let pattern = (0..length).map(|index| guest::pattern(registers.dma_seed, index));
                self.dma.write(address, &pattern.collect::<Vec<_>>())
            }
            DMA_READ => {
                let mut data = vec![0; length.try_into().ok()?];
                self.dma.read(address, &mut data)?;
                registers.dma_sum = guest::checksum(&data);
                Some(())
            }
            _ => None,
        }
    }
}

impl ServerBackend for Device {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            0 => {
                for (at, byte) in (offset..).zip(data) {
                    *byte = self.register(at & !3).to_le_bytes()[lane(at)];
                }
                Ok(())
            }
            2 => {
                self.ram_traps += 1;
                self.ram.read_exact_at(data, offset)
            }
            4 => {
                data.copy_from_slice(part(&mut self.ports, offset, data.len())?);
                Ok(())
            }
            VFIO_PCI_CONFIG_REGION_INDEX => self.config.read(offset, data),
            // BAR 1 is the VMM's: it keeps the MSI-X table and the pending bits.
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match region {
            0 => {
                let (mut at, mut rest) = (offset, data);
                while !rest.is_empty() {
                    let (now, later) = rest.split_at(rest.len().min(4 - lane(at)));
                    let mut value = self.register(at & !3).to_le_bytes();
                    value[lane(at)..][..now.len()].copy_from_slice(now);
                    self.set_register(at & !3, u32::from_le_bytes(value))?;
                    at += now.len() as u64;
                    rest = later;
                }
                Ok(())
            }
            2 => {
                self.ram_traps += 1;
                if offset.saturating_add(data.len() as u64) > BAR_SIZES[2] {
                    return Err(ErrorKind::InvalidInput.into());
                }
                self.ram.write_all_at(data, offset)
            }
            4 => {
                part(&mut self.ports, offset, data.len())?.copy_from_slice(data);
                Ok(())
            }
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.config.write(offset, data)?;
                self.interrupts.update_intx(&self.config)
            }
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        self.dma.map(address, size, fd, offset)
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.dma.unmap(address, size)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.config = ConfigSpace::new();
        self.registers = Registers::default();
        self.ports = [0; 32];
        self.interrupts.set_level(&self.config, false)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        self.interrupts.set(
            &self.config,
            index,
            flags,
            start..start.saturating_add(count),
            fds,
        )
    }
}

/// Which byte of its register an offset is.
fn lane(offset: u64) -> usize {
    usize::from(offset.to_le_bytes()[0] & 3)
}

/// `len` bytes at `offset`, if there are as many.
fn part(bytes: &mut [u8], offset: u64, len: usize) -> io::Result<&mut [u8]> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let range = Range {
        start,
        end: start.saturating_add(len),
    };
    bytes
        .get_mut(range)
        .ok_or_else(|| ErrorKind::InvalidInput.into())
}
