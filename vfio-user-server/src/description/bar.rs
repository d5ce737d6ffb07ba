//! Base address registers.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::fstat;

use super::DescriptionError;

/// A base address register, and the region behind it.
#[derive(Clone, Debug)]
pub struct Bar {
    pub(super) size: u64,
    pub(super) kind: Kind,
    file: Option<Arc<File>>,
    pub(super) areas: Vec<Range<u64>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Io,
    Memory32 { prefetchable: bool },
    Memory64 { prefetchable: bool },
}

impl Bar {
    /// Registers in I/O space: 4 to 256 bytes.
    pub fn io(size: u64) -> Self {
        Self::new(size, Kind::Io)
    }

    /// Memory below 4 GiB.
    pub fn memory32(size: u64) -> Self {
        Self::new(
            size,
            Kind::Memory32 {
                prefetchable: false,
            },
        )
    }

    /// Memory anywhere. It takes the next BAR's register too.
    pub fn memory64(size: u64) -> Self {
        Self::new(
            size,
            Kind::Memory64 {
                prefetchable: false,
            },
        )
    }

    fn new(size: u64, kind: Kind) -> Self {
        Self {
            size,
            kind,
            file: None,
            areas: Vec::new(),
        }
    }

    /// Makes memory prefetchable: reads have no effect, and writes may be merged.
    #[must_use]
    pub fn prefetchable(mut self) -> Self {
        self.kind = match self.kind {
            Kind::Io => Kind::Io,
            Kind::Memory32 { .. } => Kind::Memory32 { prefetchable: true },
            Kind::Memory64 { .. } => Kind::Memory64 { prefetchable: true },
        };
        self
    }

    /// Says that the BAR is a file, of which parts can be [mapped](Self::mappable). It begins where the file does, which
    /// should be a memfd that is sealed against shrinking, as the VMM wants it.
    #[must_use]
    pub fn backed_by(mut self, file: Arc<File>) -> Self {
        self.file = Some(file);
        self
    }

    /// Lets the guest reach a part of a BAR that is [backed](Self::backed_by) by a file without a message: pages of
    /// memory, from and to so many bytes.
    ///
    /// The device still has to serve messages for it: not every VMM maps it.
    #[must_use]
    pub fn mappable(mut self, area: Range<u64>) -> Self {
        self.areas.push(area);
        self
    }

    pub(super) fn check_areas(&self, index: u8) -> Result<(), DescriptionError> {
        let length = self
            .file
            .as_ref()
            .and_then(|file| fstat(file).ok())
            .and_then(|stat| u64::try_from(stat.st_size).ok())
            .unwrap_or(0);
        for (at, area) in self.areas.iter().enumerate() {
            let mut others = self.areas.iter().take(at);
            let apart = others.all(|other| other.end <= area.start || area.end <= other.start);
            let aligned = (area.start | area.end).is_multiple_of(PAGE_SIZE);
            let fits = area.start < area.end && area.end <= self.size && area.end <= length;
            if self.kind == Kind::Io || !(apart && aligned && fits) {
                let area = area.clone();
                return Err(DescriptionError::Area { bar: index, area });
            }
        }
        Ok(())
    }
}

impl Bar {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn is_io(&self) -> bool {
        self.kind == Kind::Io
    }

    /// The file behind the areas that can be mapped, if there are any.
    pub(crate) fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref().filter(|_| !self.areas.is_empty())
    }

    pub(crate) fn areas(&self) -> &[Range<u64>] {
        &self.areas
    }
}

/// What can be mapped consists of pages, in bytes.
const PAGE_SIZE: u64 = 4096;
