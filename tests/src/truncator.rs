//! A device server that takes away what it has given: the memory behind a BAR.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use iced_x86::code_asm::{dword_ptr, eax, ebp, edi};
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::NamedTempFile;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion, SparseArea};

use crate::device_thread::DeviceThread;
use crate::tiny::{self, FIRST_DEVICE};

/// A device with a register, a write to which truncates the file behind its other BAR.
struct Truncator(File);

const BAR_SIZE: u64 = 0x1000;
const SIZES: [u64; 9] = [BAR_SIZE, BAR_SIZE, 0, 0, 0, 0, 0, 256, 0];

impl ServerBackend for Truncator {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region != VFIO_PCI_CONFIG_REGION_INDEX {
            return Err(ErrorKind::InvalidInput.into());
        }
        let ids = [0x52, 0x4f, 0x03, 0x00]
            .into_iter()
            .chain(std::iter::repeat(0));
        for (to, from) in data
            .iter_mut()
            .zip(ids.skip(usize::try_from(offset).unwrap_or(usize::MAX)))
        {
            *to = from;
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, _: u64, _: &[u8]) -> io::Result<()> {
        if region == 0 {
            self.0.set_len(0)
        } else {
            Ok(())
        }
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        _: Option<File>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

fn regions(file: &File) -> Vec<ServerRegion> {
    let region = |(index, size)| {
        let mapped = index == 1;
        let area = vfio_region_sparse_mmap_area { offset: 0, size };
        ServerRegion {
            region_info: vfio_region_info {
                argsz: 32,
                flags: VFIO_REGION_INFO_FLAG_READ
                    | VFIO_REGION_INFO_FLAG_WRITE
                    | if mapped {
                        VFIO_REGION_INFO_FLAG_MMAP
                    } else {
                        0
                    },
                index,
                size,
                ..Default::default()
            },
            sparse_areas: if mapped {
                vec![SparseArea { area }]
            } else {
                Vec::new()
            },
            mmap_fd: mapped.then(|| file.as_raw_fd()),
        }
    };
    (0..).zip(SIZES).map(region).collect()
}

/// Starts the server.
///
/// # Errors
/// When it does not start.
pub fn serve() -> anyhow::Result<DeviceThread> {
    let file: File = memfd_create("bar", MemfdFlags::CLOEXEC)?.into();
    file.set_len(BAR_SIZE)?;
    let regions = regions(&file);
    let irqs = (0..5)
        .map(|index| IrqInfo {
            index,
            flags: 0,
            count: 0,
        })
        .collect();
    DeviceThread::custom(Truncator(file), irqs, regions)
}

/// A guest that prints A when the BAR is memory, and B when it then reads as all-ones.
///
/// # Errors
/// When its file cannot be written.
pub fn guest() -> anyhow::Result<NamedTempFile> {
    tiny::guest(|code| {
        let mut wrong = code.create_label();
        code.store(FIRST_DEVICE + 4, 2)?;
        code.mov(ebp, dword_ptr(FIRST_DEVICE + 0x10))?;
        code.mov(edi, dword_ptr(FIRST_DEVICE + 0x14))?;
        code.mov(dword_ptr(edi), 0x1234_5678)?;
        code.mov(eax, dword_ptr(edi))?;
        code.cmp(eax, 0x1234_5678)?;
        code.jne(wrong)?;
        code.print(b'A')?;
        code.mov(dword_ptr(ebp), 1)?;
        code.mov(eax, dword_ptr(edi))?;
        code.cmp(eax, -1)?;
        code.jne(wrong)?;
        code.print(b'B')?;
        code.set_label(&mut wrong)?;
        code.power_off()
    })
}
