//! The device's state, as it migrates.

use std::io;
use std::os::unix::fs::FileExt;

use vfio_user_server::StateStream;

use super::device::{Demo, PORTS};
use super::filler;
use super::registers::{DMA_LATER, DMA_READ, DMA_WRITE, Values};

/// What is being saved: the state without its filler.
#[derive(Debug, Default)]
pub(super) struct Saving(Vec<u8>);

/// What is being restored.
#[derive(Debug, Default)]
pub(super) struct Loading {
    /// The state without its filler, as far as it has come.
    head: Vec<u8>,
}

/// Bytes in BAR 2.
const RAM: usize = 0x1_0000;

impl Demo {
    /// The state without its filler: registers, ports and memory.
    fn save_head(&self) -> io::Result<Vec<u8>> {
        let mut head = self.worker.with(|values| {
            let words = values.words().flat_map(|word| word.to_le_bytes());
            words.collect::<Vec<_>>()
        });
        head.extend(self.ports);
        let mut ram = vec![0; RAM];
        self.ram.read_exact_at(&mut ram, 0)?;
        head.extend(ram);
        Ok(head)
    }

    /// Takes over registers, ports and memory.
    fn load_head(&mut self, head: &[u8], values: Values) -> io::Result<()> {
        let memory = head
            .get(head_size() - RAM..)
            .ok_or(io::ErrorKind::InvalidData)?;
        let ports = head
            .get(head_size() - RAM - PORTS..)
            .and_then(|ports| ports.first_chunk());
        self.ports = *ports.ok_or(io::ErrorKind::InvalidData)?;
        self.ram.write_all_at(memory, 0)?;
        self.host.interrupts.set_intx(values.intx & 1 != 0);
        self.worker.interrupt(|current| *current = values);
        Ok(())
    }
}

impl StateStream for Demo {
    fn read_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.fail_on_request()?;
        if offset == 0 {
            self.saving = Saving(self.save_head()?);
        }
        let head = &self.saving.0;
        let size = head.len() as u64 + kib(self.worker.with(|values| values.state_size));
        let count = size.saturating_sub(offset).min(data.len() as u64);
        let data = usize::try_from(count)
            .ok()
            .and_then(|count| data.get_mut(..count));
        let data = data.ok_or(io::ErrorKind::InvalidInput)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let head = head.get(start..).unwrap_or(&[]);
        for (to, from) in data.iter_mut().zip(head) {
            *to = *from;
        }
        if let Some(rest) = data.get_mut(head.len()..) {
            let filled = (offset + head.len() as u64).saturating_sub(self.saving.0.len() as u64);
            filler::fill(filled, rest);
        }
        Ok(data.len())
    }

    fn write_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset == 0 {
            self.loading.head.clear();
        }
        let missing = head_size().saturating_sub(self.loading.head.len());
        let (head, rest) = data.split_at_checked(missing).unwrap_or((data, &[]));
        self.loading.head.extend_from_slice(head);
        let filled = (offset + head.len() as u64).saturating_sub(head_size() as u64);
        if filler::is_filler(filled, rest) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    fn state_written(&mut self, size: u64) -> io::Result<()> {
        let head = std::mem::take(&mut self.loading.head);
        let mut values = Values::default();
        let (words, _) = head.as_chunks();
        for (register, word) in values.words().zip(words) {
            *register = u32::from_le_bytes(*word);
        }
        let possible = [0, DMA_READ | DMA_LATER, DMA_WRITE | DMA_LATER].contains(&values.pending);
        if head.len() != head_size()
            || size != head.len() as u64 + kib(values.state_size)
            || !possible
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.load_head(&head, values)
    }

    fn has_early_state(&self) -> bool {
        true
    }

    fn read_early_state(&mut self, offset: u64, data: &mut [u8]) -> io::Result<usize> {
        self.fail_on_request()?;
        let size = kib(self.worker.with(|values| values.early_size));
        let count = size.saturating_sub(offset).min(data.len() as u64);
        let data = usize::try_from(count)
            .ok()
            .and_then(|count| data.get_mut(..count));
        let data = data.ok_or(io::ErrorKind::InvalidInput)?;
        filler::fill(offset, data);
        Ok(data.len())
    }

    fn write_early_state(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if filler::is_filler(offset, data) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

/// Bytes of state without the filler.
fn head_size() -> usize {
    4 * Values::default().words().count() + PORTS + RAM
}

fn kib(number: u32) -> u64 {
    u64::from(number) << 10
}
