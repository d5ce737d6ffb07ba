//! Guests that do I/O with a disk, and check it or are measured.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, al, ax, bl, bx, byte_ptr, cx, di, dword_ptr, dx, eax, ebp, ebx, ecx, edi, edx, esi,
    word_ptr,
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
    /// How many there are in all.
    pub requests: u32,
    /// Whether they go anywhere, or one behind the other.
    pub random: bool,
    /// Whether what is written tells where, and what is read is checked for that.
    pub checked: bool,
    /// Bytes of the image that they go to, from its beginning on: a power of two.
    pub size: u64,
}

// What there is for each chain: a header, a table of descriptors, a status and a buffer.
const HEADERS: u32 = 0x41_0000;
const TABLES: u32 = 0x42_0000;
const STATUSES: u32 = 0x43_0000;
const BUFFERS: u32 = 0x80_0000;
/// What is in a checked buffer between its first and its last word.
const PATTERN: u32 = 0x60_0000;

/// The index of the available ring when the device was last told of it.
const TOLD: u32 = SCRATCH + 0x940;
/// The index of the used ring when the job is done.
const DONE: u32 = SCRATCH + 0x944;

// Flags of descriptors, and where the number of the next one begins in the same word.
const NEXT: u32 = 1;
const WRITE: u32 = 2;
const INDIRECT: u32 = 4;
const NUMBER: u32 = 16;

const SECTOR: u32 = 512;

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
    code.sub(ebx, ebx)?;
    code.store(TOLD, 0)
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
/// of the available ring, EDI that of the used ring, EBP the number of requests that have not been made yet, and ESI
/// what tells the next position.
impl Job {
    /// Writes everything into the chains that stays as it is, and lets nothing be left in the buffers.
    fn prepare(&self, code: &mut Code) -> Result<(), IcedError> {
        let (kind, to_data) = if self.writes { (1, 0) } else { (0, WRITE) };
        for chain in 0..u32::from(self.depth) {
            let header = HEADERS + 16 * chain;
            let table = TABLES + 64 * chain;
            let data = BUFFERS + self.length * chain;
            for (address, words) in [
                (header, [kind, 0, 0, 0]),
                (table, [header, 0, 16, NEXT | 1 << NUMBER]),
                (
                    table + 16,
                    [data, 0, self.length, NEXT | to_data | 2 << NUMBER],
                ),
                (table + 32, [STATUSES + chain, 0, 1, WRITE]),
                (DESCRIPTORS + 16 * chain, [table, 0, 48, INDIRECT]),
            ] {
                for (word, value) in (address..).step_by(4).zip(words) {
                    code.store(word, value)?;
                }
            }
            code.mov(byte_ptr(STATUSES + chain), 0xff)?;
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
        let [mut begin, mut look, mut next, mut wait, mut over] =
            std::array::from_fn(|_| code.create_label());
        // The call leaves the address of what follows it.
        code.call(begin)?;

        code.set_label(&mut look)?;
        code.mov(edi, dword_ptr(USED))?;
        code.shr(edi, 16)?;
        code.cmp(di, ax)?;
        code.je(wait)?;

        code.set_label(&mut next)?;
        code.movzx(edx, al)?;
        code.mov(edx, dword_ptr(USED + 4 + edx * 8))?;
        code.inc(eax)?;
        code.cmp(byte_ptr(STATUSES + edx), 0)?;
        code.jne(fails)?;
        if self.checked {
            self.check(code, fails)?;
        }
        self.make_request(code)?;
        code.cmp(di, ax)?;
        code.jne(next)?;
        tell_device(code)?;
        code.cmp(eax, dword_ptr(DONE))?;
        code.je(over)?;
        code.jmp(look)?;

        // With the interrupt that comes, the driver looks again.
        code.set_label(&mut wait)?;
        code.mov(ecx, eax)?;
        code.xchg(word_ptr(USED_EVENT), cx)?;
        code.cmp(word_ptr(USED + 2), ax)?;
        code.jne(look)?;
        code.sti()?;
        code.halt()?;

        code.set_label(&mut begin)?;
        code.pop(dword_ptr(RESUME))?;
        code.lea(ecx, dword_ptr(eax + self.requests.cast_signed()))?;
        code.mov(dword_ptr(DONE), ecx)?;
        code.mov(ebp, self.requests)?;
        code.sub(esi, esi)?;
        code.push(eax)?;
        code.print(BEGIN)?;
        code.pop(eax)?;
        for chain in 0..u32::from(self.depth) {
            code.mov(edx, chain)?;
            self.make_request(code)?;
        }
        tell_device(code)?;
        code.jmp(look)?;

        code.set_label(&mut over)?;
        code.push(eax)?;
        code.print(END)?;
        code.pop(eax)
    }

    /// Makes one more request with the chain in EDX, if there are any left.
    fn make_request(&self, code: &mut Code) -> Result<(), IcedError> {
        let mut none = code.create_label();
        code.test(ebp, ebp)?;
        code.jz(none)?;
        code.dec(ebp)?;
        code.movzx(ecx, bl)?;
        code.mov(word_ptr(AVAILABLE + 4 + ecx * 2), dx)?;
        code.inc(ebx)?;
        self.next_position(code)?;
        if self.checked && self.writes {
            let (first, last) = self.ends();
            code.push(edx)?;
            code.shl(edx, self.length.ilog2())?;
            code.mov(dword_ptr(edx + first), ecx)?;
            code.mov(dword_ptr(edx + last), ecx)?;
            code.pop(edx)?;
        }
        code.shl(edx, 4)?;
        code.mov(dword_ptr(edx + HEADERS + 8), ecx)?;
        code.set_label(&mut none)
    }

    /// Gives ECX the next sector.
    fn next_position(&self, code: &mut Code) -> Result<(), IcedError> {
        let requests = self.size / u64::from(self.length);
        if self.random {
            // A linear congruential generator, whose upper bits are the better ones.
            code.imul_3(esi, esi, 1_664_525)?;
            code.add(esi, 1_013_904_223)?;
            code.mov(ecx, esi)?;
            code.shr(ecx, 32 - requests.ilog2())?;
        } else {
            let mask = u32::try_from(requests - 1).unwrap_or(u32::MAX);
            code.mov(ecx, esi)?;
            code.and(ecx, mask.cast_signed())?;
            code.inc(esi)?;
        }
        code.shl(ecx, (self.length / SECTOR).ilog2())
    }

    /// Goes to `fails` if the buffer of the chain in EDX has not what belongs there, for a job that reads.
    fn check(&self, code: &mut Code, fails: CodeLabel) -> Result<(), IcedError> {
        if self.writes {
            return Ok(());
        }
        let (first, last) = self.ends();
        for register in [edx, esi, edi] {
            code.push(register)?;
        }
        code.mov(edi, edx)?;
        code.shl(edi, self.length.ilog2())?;
        code.shl(edx, 4)?;
        code.mov(ecx, dword_ptr(edx + HEADERS + 8))?;
        code.cmp(dword_ptr(edi + first), ecx)?;
        code.jne(fails)?;
        code.cmp(dword_ptr(edi + last), ecx)?;
        code.jne(fails)?;
        code.add(edi, (BUFFERS + 4).cast_signed())?;
        code.mov(esi, PATTERN + 4)?;
        code.mov(ecx, self.length / 4 - 2)?;
        code.repe().cmpsd()?;
        code.jne(fails)?;
        for register in [edi, esi, edx] {
            code.pop(register)?;
        }
        Ok(())
    }

    /// The first and the last word of chain 0's buffer.
    fn ends(&self) -> (u32, u32) {
        (BUFFERS, BUFFERS + self.length - 4)
    }
}

/// Lets the device see the requests that have been made, and rings its doorbell if it wants that for one of them
/// (virtio 1.2, 2.7.7.2 and 2.7.10).
fn tell_device(code: &mut Code) -> Result<(), IcedError> {
    let mut done = code.create_label();
    code.mov(ecx, ebx)?;
    code.xchg(word_ptr(AVAILABLE + 2), cx)?;
    code.mov(ecx, ebx)?;
    code.sub(cx, word_ptr(AVAILABLE_EVENT))?;
    code.dec(cx)?;
    code.mov(edx, ebx)?;
    code.sub(dx, word_ptr(TOLD))?;
    code.mov(word_ptr(TOLD), bx)?;
    code.cmp(cx, dx)?;
    code.jae(done)?;
    code.mov(ecx, dword_ptr(DOORBELL))?;
    code.mov(word_ptr(ecx), 0)?;
    code.set_label(&mut done)
}
