//! Guests that do I/O with a disk, and check it or are measured.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, al, ax, bl, cx, dword_ptr, dx, eax, ebp, ebx, ecx, edi, edx, esi, word_ptr,
};
use tempfile::NamedTempFile;

use super::virtio::{AVAILABLE, AVAILABLE_EVENT, DESCRIPTORS, DOORBELL, RESUME, USED, USED_EVENT};
use super::{Code, SCRATCH, guest};

/// What the guest prints when a job begins and when it is done, and when something is wrong.
pub const BEGIN: u8 = b'B';
/// See [`BEGIN`].
pub const END: u8 = b'E';
/// See [`BEGIN`].
pub const FAILED: u8 = b'!';

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Whether they write.
    pub writes: bool,
    /// Bytes of each: a power of two, of 512 at least.
    pub length: u32,
    /// How many there are at a time: 32 at most, in 32 MiB of memory.
    pub depth: u16,
    /// How many there are in all: at least as many as at a time, and in whole halves of them.
    pub requests: u32,
    /// Whether they go anywhere, or one behind the other.
    pub random: bool,
    /// Whether what is written tells where, and what is read is checked for that.
    pub checked: bool,
    /// Bytes of the image that they go to, from its beginning on: a power of two.
    pub size: u64,
}

// What there is for each chain: a header, a table of descriptors and a buffer.
const HEADERS: u32 = 0x41_0000;
/// The sector in a header: its lower half, which is enough. In the upper byte of that is the status: when a request has
/// failed, those that come after it with the same chain fail, too, since there is no such sector. So it is enough to look
/// at the last one.
const POSITIONS: u32 = HEADERS + 8;
const STATUS: u32 = 0xff00_0000;
const TABLES: u32 = 0x42_0000;
const BUFFERS: u32 = 0x80_0000;
/// What is in a checked buffer between its first and its last word.
const PATTERN: u32 = 0x60_0000;

/// How many requests are still to be made.
const TO_MAKE: u32 = SCRATCH + 0x940;
/// The index of the used ring when the job is done.
const DONE: u32 = SCRATCH + 0x944;

// Flags of descriptors, and where the number of the next one begins in the same word.
const NEXT: u32 = 1;
const WRITE: u32 = 2;
const INDIRECT: u32 = 4;
const NUMBER: u32 = 16;

const SECTOR: u32 = 512;
/// How many requests a random one is away from the one before: an odd number, and far (2^32 by the golden ratio).
const FAR: u32 = 0x9e37_79b1;
/// Sectors of a part of the image: as many as 16 bits can count.
const PART: u32 = 1 << 16;

/// A guest that does these jobs, one after the other, and then waits for ever. It needs 64 MiB of memory.
///
/// # Errors
/// As of [`guest()`].
pub fn disk_guest(jobs: &[Job]) -> anyhow::Result<NamedTempFile> {
    guest(|code| {
        let fails = code.create_label();
        code.start_disk(fails)?;
        begin(code)?;
        run(code, jobs, fails)?;
        code.halt()?;
        end(code, fails)
    })
}

/// As [`disk_guest`], with a second CPU, which does something else. It begins without a stack.
///
/// # Errors
/// As of [`guest()`].
pub fn disk_guest_beside(
    jobs: &[Job],
    second: impl FnOnce(&mut Code) -> Result<(), IcedError>,
) -> anyhow::Result<NamedTempFile> {
    guest(|code| {
        let (fails, mut entry) = (code.create_label(), code.create_label());
        code.start_disk(fails)?;
        code.start_second_cpu(entry)?;
        begin(code)?;
        run(code, jobs, fails)?;
        code.halt()?;
        end(code, fails)?;
        code.set_label(&mut entry)?;
        second(code)
    })
}

/// As [`disk_guest_beside`], with a first CPU that ends its line and begins again with the first job when
/// it has done the last.
///
/// # Errors
/// As of [`guest()`].
pub fn endless_disk_guest_beside(
    jobs: &[Job],
    second: impl FnOnce(&mut Code) -> Result<(), IcedError>,
) -> anyhow::Result<NamedTempFile> {
    guest(|code| {
        let [fails, mut again, mut entry] = std::array::from_fn(|_| code.create_label());
        code.start_disk(fails)?;
        code.start_second_cpu(entry)?;
        begin(code)?;
        code.set_label(&mut again)?;
        run(code, jobs, fails)?;
        code.push(eax)?;
        code.print(b'\n')?;
        code.pop(eax)?;
        code.jmp(again)?;
        end(code, fails)?;
        code.set_label(&mut entry)?;
        second(code)
    })
}

/// Nothing has been made available or used yet.
fn begin(code: &mut Code) -> Result<(), IcedError> {
    code.sub(eax, eax)?;
    code.sub(ebx, ebx)
}

fn run(code: &mut Code, jobs: &[Job], fails: CodeLabel) -> Result<(), IcedError> {
    for job in jobs {
        job.prepare(code)?;
        job.run(code, fails)?;
    }
    Ok(())
}

/// What is behind all jobs: where the guest goes when one fails, and the handler of the disk's interrupt.
fn end(code: &mut Code, mut fails: CodeLabel) -> Result<(), IcedError> {
    code.set_label(&mut fails)?;
    code.print(FAILED)?;
    code.halt()?;
    code.disk_handler()
}

/// The registers while a job runs: EAX is the index of the used ring up to which the driver has looked, EBX the index
/// of the available ring, ESI the sector of the next request, and EBP has bits set if a request has failed.
///
/// A request takes few instructions, so that it is the disk that is measured and not the CPU, also where KVM emulates each
/// of them in half a microsecond. That is why the driver deals with requests in groups, whose places in the rings are in
/// the code, and why everything of a chain is where its number says.
impl Job {
    /// How many requests the driver waits for and makes at a time: half of those that there are.
    fn group(&self) -> u32 {
        u32::from(self.depth / 2).max(1)
    }

    /// Writes everything into the chains that stays as it is, and lets nothing be left in the buffers.
    fn prepare(&self, code: &mut Code) -> Result<(), IcedError> {
        let (kind, to_data) = if self.writes { (1, 0) } else { (0, WRITE) };
        for chain in 0..u32::from(self.depth) {
            let header = HEADERS + 16 * chain;
            let table = TABLES + 64 * chain;
            let data = BUFFERS + self.length * chain;
            for (address, words) in [
                (header, [kind, 0, self.first_position(chain), 0]),
                (table, [header, 0, 16, NEXT | 1 << NUMBER]),
                (
                    table + 16,
                    [data, 0, self.length, NEXT | to_data | 2 << NUMBER],
                ),
                (table + 32, [header + 8 + 3, 0, 1, WRITE]),
                (DESCRIPTORS + 32 * chain, [table, 0, 48, INDIRECT]),
            ] {
                for (word, value) in (address..).step_by(4).zip(words) {
                    code.store(word, value)?;
                }
            }
        }
        if self.checked {
            self.fill(code)?;
        }
        Ok(())
    }

    /// Writes the pattern, and into the buffers the same, or zeroes if they are read into.
    fn fill(&self, code: &mut Code) -> Result<(), IcedError> {
        let words = self.length / 4;
        code.push(eax)?;
        code.mov(edi, PATTERN)?;
        code.mov(ecx, words)?;
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.imul_3(eax, ecx, 0x9e37_79b1_u32.cast_signed())?;
        code.stosd()?;
        code.dec(ecx)?;
        code.jnz(again)?;
        code.sub(eax, eax)?;
        for chain in 0..u32::from(self.depth) {
            code.mov(edi, BUFFERS + self.length * chain)?;
            code.mov(esi, PATTERN)?;
            code.mov(ecx, words)?;
            if self.writes {
                code.rep().movsd()?;
            } else {
                code.rep().stosd()?;
            }
        }
        code.pop(eax)
    }

    fn run(&self, code: &mut Code, fails: CodeLabel) -> Result<(), IcedError> {
        let [mut begin, mut look, mut wait, mut last, mut over] =
            std::array::from_fn(|_| code.create_label());
        let group = self.group().cast_signed();
        // The call leaves the address of what follows it.
        code.call(begin)?;

        code.set_label(&mut look)?;
        code.movzx(ecx, word_ptr(USED + 2))?;
        code.sub(cx, ax)?;
        code.cmp(cx, group)?;
        code.jb(wait)?;
        code.sub(dword_ptr(TO_MAKE), group)?;
        code.js(last)?;
        self.take(code, fails, true)?;
        self.tell_device(code, self.group(), look)?;

        // There are no more to be made.
        code.set_label(&mut last)?;
        self.take(code, fails, false)?;
        code.test(ebp, STATUS.cast_signed())?;
        code.jnz(fails)?;
        code.cmp(eax, dword_ptr(DONE))?;
        code.jne(look)?;
        code.jmp(over)?;

        // With the interrupt that comes, the driver looks again.
        code.set_label(&mut wait)?;
        code.lea(ecx, dword_ptr(eax + (group - 1)))?;
        code.xchg(word_ptr(USED_EVENT), cx)?;
        code.movzx(ecx, word_ptr(USED + 2))?;
        code.sub(cx, ax)?;
        code.cmp(cx, group)?;
        code.jae(look)?;
        code.sti()?;
        code.halt()?;

        code.set_label(&mut begin)?;
        code.pop(dword_ptr(RESUME))?;
        code.lea(ecx, dword_ptr(eax + self.requests.cast_signed()))?;
        code.mov(dword_ptr(DONE), ecx)?;
        code.store(TO_MAKE, self.requests - u32::from(self.depth))?;
        code.sub(ebp, ebp)?;
        code.sub(esi, esi)?;
        code.push(eax)?;
        code.print(BEGIN)?;
        code.pop(eax)?;
        for chain in 0..u32::from(self.depth) {
            code.movzx(edi, bl)?;
            code.mov(edx, 2 * chain)?;
            self.make_request(code, 0)?;
            code.inc(ebx)?;
        }
        self.tell_device(code, self.depth.into(), look)?;

        code.set_label(&mut over)?;
        code.push(eax)?;
        code.print(END)?;
        code.pop(eax)
    }

    /// Takes a group of requests that are done, and makes as many more if there are to be more.
    fn take(&self, code: &mut Code, fails: CodeLabel, makes_more: bool) -> Result<(), IcedError> {
        // A group ends where the ring does, or before.
        code.movzx(ecx, al)?;
        code.movzx(edi, bl)?;
        for place in 0..self.group() {
            code.mov(edx, dword_ptr(ecx * 8 + (USED + 4 + 8 * place)))?;
            if !(makes_more && self.keeps_to_parts()) {
                code.or(ebp, dword_ptr(edx * 8 + POSITIONS))?;
            }
            if self.checked {
                self.check(code, fails)?;
            }
            if makes_more {
                self.make_request(code, place)?;
            }
        }
        let group = self.group().cast_signed();
        if makes_more {
            code.add(ebx, group)?;
        }
        code.add(eax, group)
    }

    /// Makes one more request with the chain whose number is in EDX, in this place of the group that begins at EDI in the
    /// available ring.
    fn make_request(&self, code: &mut Code, place: u32) -> Result<(), IcedError> {
        if self.checked && self.writes {
            let (first, last) = self.ends();
            code.push(edx)?;
            code.shl(edx, self.length.ilog2() - 1)?;
            code.mov(dword_ptr(edx + first), esi)?;
            code.mov(dword_ptr(edx + last), esi)?;
            code.pop(edx)?;
        }
        code.mov(word_ptr(edi * 2 + (AVAILABLE + 4 + 2 * place)), dx)?;
        self.next_position(code)
    }

    /// Gives the request the next sector. All of the image is gone through before one comes again.
    fn next_position(&self, code: &mut Code) -> Result<(), IcedError> {
        let sectors = self.length / SECTOR;
        let step = if self.random { FAR } else { 1 };
        let step = step.wrapping_mul(sectors);
        if self.keeps_to_parts() {
            return code.add(word_ptr(edx * 8 + POSITIONS), step & (PART - 1));
        }
        let mask = u32::try_from(self.size / u64::from(SECTOR) - 1).unwrap_or(u32::MAX);
        code.mov(dword_ptr(edx * 8 + POSITIONS), esi)?;
        code.add(esi, step.cast_signed())?;
        code.and(esi, mask.cast_signed())
    }

    /// Whether each chain keeps to a part of the image, which takes the fewest instructions. Together they go everywhere.
    fn keeps_to_parts(&self) -> bool {
        self.random && !self.checked && self.depth > 1
    }

    /// The first sector of a chain that keeps to a part. Two chains with the same part begin half of it apart.
    fn first_position(&self, chain: u32) -> u32 {
        let parts = u32::try_from(self.size / u64::from(SECTOR * PART)).unwrap_or(u32::MAX);
        let parts = parts.max(1);
        chain % parts * PART + chain / parts % 2 * (PART / 2)
    }

    /// Goes to `fails` if the buffer of the chain in EDX has not what belongs there, for a job that reads.
    fn check(&self, code: &mut Code, fails: CodeLabel) -> Result<(), IcedError> {
        if self.writes {
            return Ok(());
        }
        let (first, last) = self.ends();
        for register in [ecx, edx, esi, edi] {
            code.push(register)?;
        }
        code.mov(ecx, dword_ptr(edx * 8 + POSITIONS))?;
        code.mov(edi, edx)?;
        code.shl(edi, self.length.ilog2() - 1)?;
        code.cmp(dword_ptr(edi + first), ecx)?;
        code.jne(fails)?;
        code.cmp(dword_ptr(edi + last), ecx)?;
        code.jne(fails)?;
        code.add(edi, (BUFFERS + 4).cast_signed())?;
        code.mov(esi, PATTERN + 4)?;
        code.mov(ecx, self.length / 4 - 2)?;
        code.repe().cmpsd()?;
        code.jne(fails)?;
        for register in [edi, esi, edx, ecx] {
            code.pop(register)?;
        }
        Ok(())
    }

    /// The first and the last word of chain 0's buffer.
    fn ends(&self) -> (u32, u32) {
        (BUFFERS, BUFFERS + self.length - 4)
    }

    /// Lets the device see so many requests that have been made, and rings its doorbell if it wants that for one of them
    /// (virtio 1.2, 2.7.7.2 and 2.7.10). Then goes to `next`.
    fn tell_device(&self, code: &mut Code, count: u32, next: CodeLabel) -> Result<(), IcedError> {
        code.mov(ecx, ebx)?;
        code.xchg(word_ptr(AVAILABLE + 2), cx)?;
        code.lea(ecx, dword_ptr(ebx - 1))?;
        code.sub(cx, word_ptr(AVAILABLE_EVENT))?;
        code.cmp(cx, count.cast_signed())?;
        code.jae(next)?;
        code.mov(ecx, dword_ptr(DOORBELL))?;
        code.mov(word_ptr(ecx), 0)?;
        code.jmp(next)
    }
}
