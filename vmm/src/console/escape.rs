//! The key that is not for the guest: Ctrl-A, and what follows it.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// What the user types, with the commands to the VMM taken out.
#[derive(Debug, Default)]
pub(super) struct Escape {
    after_prefix: bool,
}

impl Escape {
    /// Passes what is for the guest on to `guest`, and says whether the user wants to leave. Ctrl-A x leaves, a second
    /// Ctrl-A is one for the guest, and Ctrl-A with any other key is both for the guest.
    pub(super) fn filter(&mut self, typed: &[u8], mut guest: impl FnMut(u8)) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.after_prefix), byte) {
                (false, PREFIX) => self.after_prefix = true,
                (true, b'x') => return true,
                (true, PREFIX) => guest(PREFIX),
                (true, byte) => {
                    guest(PREFIX);
                    guest(byte);
                }
                (false, byte) => guest(byte),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(escape: &mut Escape, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut guest = Vec::new();
        let leave = escape.filter(typed, |byte| guest.push(byte));
        (guest, leave)
    }

    #[test]
    fn prefix_and_x_leave() {
        let mut escape = Escape::default();
        assert_eq!(filter(&mut escape, b"ax\x01"), (b"ax".to_vec(), false));
        assert_eq!(filter(&mut escape, b"xyz"), (vec![], true));
    }

    #[test]
    fn prefix_reaches_the_guest() {
        let mut escape = Escape::default();
        assert_eq!(
            filter(&mut escape, b"\x01\x01\x01b"),
            (b"\x01\x01b".to_vec(), false)
        );
    }
}
