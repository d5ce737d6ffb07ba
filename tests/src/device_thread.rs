//! vfio-user servers inside the test's own process.

use std::fs::File;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::{io, thread};

use tempfile::TempDir;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

/// A server that serves one client on a socket of its own, and then ends.
#[derive(Debug)]
pub struct DeviceThread {
    // Removed with the socket in it on drop.
    _folder: TempDir,
    socket: PathBuf,
}

impl DeviceThread {
    /// Starts the test device.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn test_device() -> anyhow::Result<Self> {
        Self::start(crate::device::serve)
    }

    /// Starts a device of the test's own, that has BARs and nothing else.
    ///
    /// # Errors
    /// When there is no place for the socket, or the server does not start.
    pub fn custom(registers: impl Registers, bars: &[Bar]) -> anyhow::Result<Self> {
        let regions = regions(bars);
        let irqs = (0..5)
            .map(|index| IrqInfo {
                index,
                flags: 0,
                count: 0,
            })
            .collect();
        let mut device = Plain {
            config: config_space(bars),
            registers,
        };
        Self::start(move |socket, ready| {
            let server = Server::new(socket, true, irqs, regions)?;
            ready();
            server.run(&mut device)
        })
    }

    fn start(
        serve: impl FnOnce(&Path, Box<dyn FnOnce()>) -> Result<(), vfio_user::Error> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("device.sock");
        let (ready, is_ready) = mpsc::channel();
        thread::spawn({
            let socket = socket.clone();
            move || {
                serve(
                    &socket,
                    Box::new(move || ready.send(()).unwrap_or_default()),
                )
            }
        });
        is_ready.recv()?;
        Ok(Self {
            _folder: folder,
            socket,
        })
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

/// What is behind the BARs of a device of the test's own.
pub trait Registers: Send + 'static {
    /// Reads from a BAR.
    ///
    /// # Errors
    /// Which the client is told.
    fn read(&mut self, bar: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes to a BAR.
    ///
    /// # Errors
    /// Which the client is told.
    fn write(&mut self, bar: u32, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// A BAR of such a device, by default one of memory with a 32-bit address.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bar {
    /// Its length in bytes.
    pub size: u64,
    /// Whether it is of I/O ports.
    pub io: bool,
    /// What a client may map for all of it.
    pub file: Option<RawFd>,
}

/// A device that is nothing but configuration space and registers.
struct Plain<R> {
    config: Vec<u8>,
    registers: R,
}

impl<R: Registers> ServerBackend for Plain<R> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region != VFIO_PCI_CONFIG_REGION_INDEX {
            return self.registers.read(region, offset, data);
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.config.iter().skip(start)) {
            *to = *from;
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            return Ok(());
        }
        self.registers.write(region, offset, data)
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

const CONFIG_SIZE: u64 = 256;

fn config_space(bars: &[Bar]) -> Vec<u8> {
    let mut config = vec![0x52, 0x4f, 0x02, 0x00];
    config.resize(0x10, 0);
    for bar in bars {
        config.extend(u32::from(bar.io).to_le_bytes());
    }
    config.resize(256, 0);
    config
}

fn regions(bars: &[Bar]) -> Vec<ServerRegion> {
    let config = Bar {
        size: CONFIG_SIZE,
        ..Bar::default()
    };
    let mut all = bars.to_vec();
    all.resize(9, Bar::default());
    if let Some(region) = all.get_mut(VFIO_PCI_CONFIG_REGION_INDEX as usize) {
        *region = config;
    }
    let region = |(index, Bar { size, file, .. })| {
        let mut flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        let mut sparse_areas = Vec::new();
        if file.is_some() {
            flags |= VFIO_REGION_INFO_FLAG_MMAP;
            let area = vfio_region_sparse_mmap_area { offset: 0, size };
            sparse_areas.push(SparseArea { area });
        }
        ServerRegion {
            region_info: vfio_region_info {
                argsz: 32,
                flags,
                index,
                size,
                ..Default::default()
            },
            sparse_areas,
            mmap_fd: file,
        }
    };
    (0..).zip(all).map(region).collect()
}
