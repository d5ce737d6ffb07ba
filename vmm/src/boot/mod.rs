//! Loading a kernel, and the state in which the first vCPU enters it.
//!
//! Two protocols: a bzImage is entered in 64-bit mode with a zero page (Linux' Documentation/arch/x86/boot.rst), an
//! ELF file with a PVH note in 32-bit mode with a start info (Xen's docs/misc/pvh.pandoc). A reset loads everything
//! again from the files that were opened at the start.

mod cpu;
mod linux;
mod memory_map;
mod pvh;
mod reset_vector;

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub(crate) use self::cpu::BootState;
use crate::config::PayloadConfig;
use crate::layout::{self, PAGE_SIZE};
use crate::memory::Ram;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened.
    #[error("{flag} {}: cannot open it", path.display())]
    Open {
        /// The flag that named it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("{flag} {}: cannot read it", path.display())]
    Read {
        /// The flag that named it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The file is neither kind of kernel.
    #[error(
        "--kernel {}: neither a bzImage nor an ELF file (give the vmlinuz of a distribution, or a vmlinux)",
        .0.display()
    )]
    NotAKernel(PathBuf),
    /// An ELF file without the note that says where to enter it.
    #[error(
        "--kernel {}: an ELF file without a PVH note (build it with CONFIG_PVH=y, or give the bzImage)",
        .0.display()
    )]
    NoPvhNote(PathBuf),
    /// A bzImage that cannot be entered in 64-bit mode or loaded above 1 MiB.
    #[error("--kernel {}: a bzImage that has no 64-bit entry point (a 32-bit or very old kernel?)", .0.display())]
    Not64Bit(PathBuf),
    /// A kernel that does not load.
    #[error("--kernel {}: cannot load it into {memory} MiB of RAM (too little, see --memory, or a damaged file?)", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// The size of RAM in MiB.
        memory: u64,
        /// What the loader says.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// An initramfs that does not fit.
    #[error(
        "--initramfs {}: its {size} bytes do not fit into RAM behind the kernel; give the VM more with --memory",
        path.display()
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A command line that is too long.
    #[error("--cmdline: its {length} bytes are more than the {max} that this kernel takes")]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// How long it may be.
        max: usize,
    },
    /// A command line that cannot be passed on.
    #[error("--cmdline: it has a NUL character in it")]
    CmdlineNul,
    /// A boot structure does not fit into RAM.
    #[error("guest RAM is too small for the boot structures; see --memory")]
    Structure,
}

/// What is booted: files that stay open, so that a reset loads what the start loaded.
#[derive(Debug)]
pub(crate) struct Payload {
    kernel: Source,
    initramfs: Option<Source>,
    cmdline: String,
}

#[derive(Debug)]
struct Source {
    flag: &'static str,
    path: PathBuf,
    file: File,
}

/// An initramfs in RAM.
#[derive(Debug, Clone, Copy)]
struct Initramfs {
    address: u64,
    size: u64,
}

impl Payload {
    /// Opens the files.
    pub(crate) fn open(config: &PayloadConfig) -> Result<Self, BootError> {
        if config.cmdline.contains('\0') {
            return Err(BootError::CmdlineNul);
        }
        Ok(Self {
            kernel: Source::open("--kernel", &config.kernel)?,
            initramfs: config
                .initramfs
                .as_deref()
                .map(|path| Source::open("--initramfs", path))
                .transpose()?,
            cmdline: config.cmdline.clone(),
        })
    }

    /// Loads everything into RAM; the ACPI tables are there already, with their RSDP at `rsdp`.
    pub(crate) fn load(&self, ram: &Ram, rsdp: u64) -> Result<BootState, BootError> {
        reset_vector::write_reset_vector(ram)?;
        let mut magic = [0; 4];
        self.kernel.read_at(&mut magic, 0)?;
        if magic == *b"\x7fELF" {
            self.load_elf(ram, rsdp)
        } else {
            self.load_bzimage(ram, rsdp)
        }
    }

    fn load_elf(&self, ram: &Ram, rsdp: u64) -> Result<BootState, BootError> {
        let path = &self.kernel.path;
        let highmem = Some(GuestAddress(layout::HIGH_MEMORY));
        let loaded = Elf::load(ram, None, &mut self.kernel.reader()?, highmem)
            .map_err(|source| self.load_error(ram, source))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(BootError::NoPvhNote(path.clone()));
        };
        let initramfs = self.load_initramfs(ram, loaded.kernel_end, u64::from(u32::MAX))?;
        self.load_cmdline(ram, layout::CMDLINE_MAX - 1)?;
        pvh::write_start_info(ram, rsdp, initramfs)?;
        cpu::write_gdt(ram, false)?;
        Ok(BootState::Pvh {
            entry: entry.0,
            start_info: layout::PVH_START_INFO,
        })
    }

    fn load_bzimage(&self, ram: &Ram, rsdp: u64) -> Result<BootState, BootError> {
        let path = &self.kernel.path;
        let header = linux::Header::read(&self.kernel)?;
        if !header.has_64bit_entry() {
            return Err(BootError::Not64Bit(path.clone()));
        }
        let address = GuestAddress(layout::HIGH_MEMORY);
        let loaded = BzImage::load(ram, Some(address), &mut self.kernel.reader()?, None)
            .map_err(|source| self.load_error(ram, source))?;
        let setup = loaded
            .setup_header
            .ok_or_else(|| BootError::NotAKernel(path.clone()))?;
        // The kernel unpacks itself into this much memory from its load address on.
        let end = loaded
            .kernel_end
            .max(header.unpacked_end(layout::HIGH_MEMORY));
        let initramfs = self.load_initramfs(ram, end, header.initramfs_max())?;
        self.load_cmdline(ram, header.cmdline_max())?;
        linux::write_zero_page(ram, setup, rsdp, self.cmdline.len(), initramfs)?;
        cpu::write_gdt(ram, true)?;
        cpu::write_page_tables(ram)?;
        Ok(BootState::Linux64 {
            entry: header.entry_64bit(loaded.kernel_load.0),
        })
    }

    fn load_error(&self, ram: &Ram, source: linux_loader::loader::Error) -> BootError {
        use linux_loader::loader::{Error, bzimage, elf};
        let path = self.kernel.path.clone();
        match source {
            Error::Bzimage(bzimage::Error::InvalidBzImage | bzimage::Error::ReadBzImageHeader)
            | Error::Elf(elf::Error::InvalidElfMagicNumber) => BootError::NotAKernel(path),
            _ => {
                let memory = ram.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20;
                BootError::Load {
                    path,
                    memory,
                    source,
                }
            }
        }
    }

    /// Loads the initramfs as high as it may be in low RAM, behind the kernel that ends at `above`.
    fn load_initramfs(
        &self,
        ram: &Ram,
        above: u64,
        max: u64,
    ) -> Result<Option<Initramfs>, BootError> {
        let Some(source) = &self.initramfs else {
            return Ok(None);
        };
        let size = source.size()?;
        let too_large = || BootError::InitramfsTooLarge {
            path: source.path.clone(),
            size,
        };
        let ram_end = ram.iter().next().map_or(0, GuestMemoryRegion::len);
        let address = ram_end
            .min(max.saturating_add(1))
            .checked_sub(size)
            .map(|address| address / PAGE_SIZE * PAGE_SIZE)
            .filter(|&address| address >= above)
            .ok_or_else(too_large)?;
        let length = usize::try_from(size).map_err(|_| too_large())?;
        ram.read_exact_volatile_from(GuestAddress(address), &mut source.reader()?, length)
            .map_err(|error| BootError::Read {
                flag: source.flag,
                path: source.path.clone(),
                source: io::Error::other(error),
            })?;
        Ok(Some(Initramfs { address, size }))
    }

    fn load_cmdline(&self, ram: &Ram, max: usize) -> Result<(), BootError> {
        let length = self.cmdline.len();
        let max = max.min(layout::CMDLINE_MAX - 1);
        if length > max {
            return Err(BootError::CmdlineTooLong { length, max });
        }
        let end = GuestAddress(layout::CMDLINE + length as u64);
        write_slice(ram, self.cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
        write_slice(ram, &[0], end)
    }
}

fn write_slice(ram: &Ram, data: &[u8], address: GuestAddress) -> Result<(), BootError> {
    ram.write_slice(data, address)
        .map_err(|_| BootError::Structure)
}

impl Source {
    fn open(flag: &'static str, path: &Path) -> Result<Self, BootError> {
        let error = |source| BootError::Open {
            flag,
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(error)?;
        if !file.metadata().map_err(error)?.is_file() {
            return Err(error(io::Error::other("not a regular file")));
        }
        Ok(Self {
            flag,
            path: path.to_owned(),
            file,
        })
    }

    fn size(&self) -> Result<u64, BootError> {
        self.file
            .metadata()
            .map(|metadata| metadata.len())
            .map_err(|source| self.error(source))
    }

    /// Reads as much as there is.
    fn read_at(&self, data: &mut [u8], offset: u64) -> Result<usize, BootError> {
        self.file
            .read_at(data, offset)
            .map_err(|source| self.error(source))
    }

    /// A reader that starts at the beginning. (All share one position.)
    fn reader(&self) -> Result<File, BootError> {
        let mut reader = self.file.try_clone().map_err(|source| self.error(source))?;
        reader.rewind().map_err(|source| self.error(source))?;
        Ok(reader)
    }

    fn error(&self, source: io::Error) -> BootError {
        BootError::Read {
            flag: self.flag,
            path: self.path.clone(),
            source,
        }
    }
}
