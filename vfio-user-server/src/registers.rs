//! Registers of 32 bits, at every width at which a guest may access them.

use std::io;

/// A device, or a part of one, with registers of 32 bits.
///
/// It reads and writes whole registers; [`read_registers`](Self::read_registers) and
/// [`write_registers`](Self::write_registers) make accesses of any width out of that, little-endian as PCI is.
pub trait Registers {
    /// What the register at `offset`, a multiple of 4, reads.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    fn register(&mut self, offset: u64) -> io::Result<u32>;

    /// Writes the register at `offset`, a multiple of 4.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    fn set_register(&mut self, offset: u64, value: u32) -> io::Result<()>;

    /// Reads any bytes of the registers.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    fn read_registers(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut rest = data;
        let mut offset = offset;
        while !rest.is_empty() {
            let lane = lane(offset);
            let value = self.register(offset & !3)?.to_le_bytes();
            let count = rest.len().min(value.len() - lane);
            for (to, from) in rest.iter_mut().zip(value.into_iter().skip(lane)) {
                *to = from;
            }
            rest = rest.get_mut(count..).unwrap_or(&mut []);
            offset = offset.saturating_add(count as u64);
        }
        Ok(())
    }

    /// Writes any bytes of the registers. Where that is a part of a register, the rest is written as it reads.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register) and [`set_register`](Self::set_register). Registers before one that fails are
    /// written.
    fn write_registers(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut rest = data;
        let mut offset = offset;
        while !rest.is_empty() {
            let lane = lane(offset);
            let count = rest.len().min(4 - lane);
            let mut value = if count == 4 {
                [0; 4]
            } else {
                self.register(offset & !3)?.to_le_bytes()
            };
            for (to, from) in value.iter_mut().skip(lane).zip(rest) {
                *to = *from;
            }
            self.set_register(offset & !3, u32::from_le_bytes(value))?;
            rest = rest.get(count..).unwrap_or(&[]);
            offset = offset.saturating_add(count as u64);
        }
        Ok(())
    }
}

/// Which byte of its register an offset is.
fn lane(offset: u64) -> usize {
    usize::from(offset.to_le_bytes()[0] & 3)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Plain([u32; 8]);

    impl Registers for Plain {
        fn register(&mut self, offset: u64) -> io::Result<u32> {
            let index = usize::try_from(offset / 4).unwrap();
            Ok(self.0[index])
        }

        fn set_register(&mut self, offset: u64, value: u32) -> io::Result<()> {
            let index = usize::try_from(offset / 4).unwrap();
            self.0[index] = value;
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn registers_are_memory(accesses in prop::collection::vec((0_u64..32, prop::collection::vec(any::<u8>(), 0..20)), 1..50)) {
            let mut registers = Plain([0; 8]);
            let mut memory = [0; 32];
            for (offset, mut data) in accesses {
                let start = usize::try_from(offset).unwrap();
                data.truncate(32 - start);
                registers.write_registers(offset, &data).unwrap();
                memory[start..start + data.len()].copy_from_slice(&data);
                let mut read = vec![0; 32 - start];
                registers.read_registers(offset, &mut read).unwrap();
                prop_assert_eq!(&read, &memory[start..]);
            }
        }
    }
}
