//! The image: a raw file or a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    Advice, AtFlags, OFlags, StatxFlags, fadvise, fdatasync, fstat, fstatfs, ioctl_blkpbszget,
    ioctl_blksszget, statx,
};

use super::error::DiskError;
use super::lock::{self, Lock};

/// An open image. It is locked while this process may use it: exclusively, unless it is read-only.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: Arc<File>,
    path: PathBuf,
    /// Bytes in it.
    pub(super) size: u64,
    pub(super) readonly: bool,
    /// Whether the page cache is passed by.
    pub(super) direct: bool,
    pub(super) geometry: Geometry,
    /// Why the pages that this host caches may be other than those of another, if they may.
    caches_apart: Option<String>,
    is_locked: AtomicBool,
}

/// What accesses should be like, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// What positions and lengths are multiples of.
    pub(super) block: u32,
    /// What they had better be multiples of.
    pub(super) physical_block: u32,
    /// What addresses of memory are multiples of.
    pub(super) memory: u32,
    /// What lengths of pieces of memory are multiples of.
    pub(super) piece: u32,
}

/// Bytes in a sector, whatever the image has (virtio 1.2, 5.2.2).
pub(super) const SECTOR: u32 = 512;

/// How long a lock of somebody else is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// What everything takes that can do `direct=on`, in bytes.
const PAGE: u32 = 4096;

/// File systems that other hosts may have mounted too, without sharing a cache (`f_type` of statfs(2); magic numbers of
/// `linux/magic.h` and of the sources of each).
const NETWORK_FILE_SYSTEMS: [(u32, &str); 10] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB 2"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
    (0x6573_5546, "FUSE"),
];

impl Image {
    /// Opens an image without locking it.
    pub(super) fn open(path: &Path, readonly: bool, direct: bool) -> Result<Self, DiskError> {
        let flags = if direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        let failed = |source: io::Error| match source.kind() {
            ErrorKind::InvalidInput if direct => DiskError::NotDirect { path: path.into() },
            _ => DiskError::Open {
                path: path.into(),
                source,
            },
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            // Whatever else is there is not waited for.
            .custom_flags((flags | OFlags::NONBLOCK).bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotAnImage { path: path.into() });
        }
        let is_device = kind.is_block_device();
        // A block device has no size but this.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let geometry = geometry(&file, is_device, direct).map_err(failed)?;
        if !size.is_multiple_of(geometry.block.into()) {
            return Err(DiskError::Size {
                path: path.into(),
                size,
                block: geometry.block,
            });
        }
        let caches_apart = if direct || readonly {
            None
        } else {
            let file_system = fstatfs(&file).map_err(|errno| failed(errno.into()))?.f_type;
            caches_apart(is_device, file_system)
        };
        Ok(Self {
            file: Arc::new(file),
            path: path.into(),
            size,
            readonly,
            direct,
            geometry,
            caches_apart,
            is_locked: AtomicBool::new(false),
        })
    }

    /// Locks it, unless it is locked. Returns whether it had to be.
    pub(super) fn lock(&self) -> Result<bool, DiskError> {
        if self.is_locked.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let lock = if self.readonly {
            Lock::Shared
        } else {
            Lock::Exclusive
        };
        let path = || self.path.clone();
        lock::set(&self.file, lock).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => DiskError::InUse { path: path() },
            _ => DiskError::Lock {
                path: path(),
                source: error,
            },
        })?;
        self.is_locked.store(true, Ordering::SeqCst);
        Ok(true)
    }

    /// As [`lock`](Self::lock), and if somebody else has locked it, waits a little: a server that was killed keeps its lock
    /// until the kernel has finished what it had begun.
    pub(super) fn lock_patiently(&self) -> Result<(), DiskError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lock() {
                Err(DiskError::InUse { .. }) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                result => return result.map(drop),
            }
        }
    }

    /// Lets others lock it.
    pub(super) fn unlock(&self) {
        if let Err(error) = lock::set(&self.file, Lock::None) {
            log::warn!("cannot unlock {}: {error}", self.path.display());
        }
        self.is_locked.store(false, Ordering::SeqCst);
    }

    /// Has everything that was written survive a loss of power.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        fdatasync(&self.file).map_err(|errno| {
            log::error!("cannot flush {}: {errno}", self.path.display());
            errno.into()
        })
    }

    /// Forgets what is cached of it, which another host may have written since.
    pub(super) fn drop_caches(&self) {
        if let Err(errno) = fadvise(&self.file, 0, None, Advice::DontNeed) {
            log::warn!(
                "cannot drop what is cached of {}: {errno}",
                self.path.display()
            );
        }
    }

    /// Why the disk cannot migrate, if it cannot.
    pub(super) fn obstacle(&self) -> Option<String> {
        let what = self.caches_apart.as_ref()?;
        let path = self.path.display();
        Some(format!(
            "{path} is {what}, of which each host has a cache of its own; with direct=on it can migrate"
        ))
    }
}

fn geometry(file: &File, is_device: bool, direct: bool) -> io::Result<Geometry> {
    let (mut block, physical_block) = if is_device {
        (ioctl_blksszget(file)?, ioctl_blkpbszget(file)?)
    } else {
        let preferred = u32::try_from(fstat(file)?.st_blksize).unwrap_or(PAGE);
        (SECTOR, preferred.clamp(SECTOR, PAGE))
    };
    let (mut memory, mut piece) = (1, 1);
    if direct {
        let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
            .ok()
            .filter(|found| found.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let (of_memory, of_file) = found.map_or((0, 0), |found| {
            (found.stx_dio_mem_align, found.stx_dio_offset_align)
        });
        // The kernel may not say. Then this is enough for memory, and for the file there is nothing better to try.
        memory = if of_memory == 0 { PAGE } else { of_memory };
        block = block.max(of_file);
        piece = block;
    }
    let is_possible = |block: u32| block.is_power_of_two() && (SECTOR..=1 << 16).contains(&block);
    if !is_possible(block) || !memory.is_power_of_two() {
        return Err(io::Error::other("it has blocks of a size that no disk has"));
    }
    Ok(Geometry {
        block,
        physical_block: physical_block.max(block),
        memory,
        piece,
    })
}

/// What storage it is that other hosts may have too without sharing a cache, if it is: a block device, or on a file
/// system of this type.
fn caches_apart(is_device: bool, file_system: impl Into<i64>) -> Option<String> {
    if is_device {
        return Some("a block device with direct=off".to_owned());
    }
    // The numbers have 32 bits, with or without a sign.
    let [a, b, c, d, ..] = file_system.into().to_le_bytes();
    let magic = u32::from_le_bytes([a, b, c, d]);
    let mut known = NETWORK_FILE_SYSTEMS.iter();
    let (_, name) = known.find(|(number, _)| *number == magic)?;
    Some(format!("on a network file system ({name}) with direct=off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn the_second_who_wants_an_image_is_told_of_the_first() {
        let file = file(1 << 20);
        let open = |readonly| Image::open(file.path(), readonly, false).unwrap();
        let (first, second, reader) = (open(false), open(false), open(true));
        assert!(first.lock().unwrap() && !first.lock().unwrap());
        let error = second.lock().unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()) && error.contains("another VM"));
        reader.lock().unwrap_err();
        first.unlock();
        assert!(reader.lock().unwrap() && open(true).lock().unwrap());
        second.lock().unwrap_err();
    }

    #[test]
    fn storage_that_hosts_cache_apart_is_an_obstacle() {
        let file = file(1 << 20);
        let mut image = Image::open(file.path(), false, false).unwrap();
        assert_eq!(image.obstacle(), None);
        for (is_device, file_system, name) in [
            (true, 0, "a block device"),
            (false, 0x6969, "NFS"),
            (false, 0x6573_5546, "FUSE"),
            // CIFS, as kernels of 32 bits say it.
            (false, i64::from(0xff53_4d42_u32.cast_signed()), "CIFS"),
        ] {
            image.caches_apart = caches_apart(is_device, file_system);
            let obstacle = image.obstacle().unwrap();
            assert!(obstacle.contains(name), "{obstacle}");
            assert!(obstacle.contains("direct=on it can migrate"), "{obstacle}");
        }
        // ext4, XFS, Btrfs, tmpfs.
        for local in [0xef53_i64, 0x5846_5342, 0x9123_683e, 0x0102_1994] {
            assert_eq!(caches_apart(false, local), None);
        }
    }

    #[test]
    fn only_images_are_opened() {
        let file = file(1000);
        let open = |path: &Path| Image::open(path, false, false).unwrap_err().to_string();
        assert!(open(file.path()).contains("truncate -s %512"));
        assert!(open(Path::new("/dev/null")).contains("neither a file nor a block device"));
        assert!(open(Path::new("/nowhere")).contains("/nowhere"));
        let folder = tempfile::tempdir().unwrap();
        assert!(Image::open(folder.path(), true, false).is_err());
    }
}
