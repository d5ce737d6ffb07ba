//! What tests write to disks, so that whoever reads a disk later can tell whether something is lost.
//!
//! A disk begins with a [`Plan`], as text in its first page. Behind it are the plan's regions. A region is written in
//! generations, 1, 2, 3 and so on: each is a few [`Run`]s of sectors, which follow from the disk's seed, the region and the
//! generation, and after which the disk is flushed. A sector says what it is, and follows from that. So it takes no more
//! than to know which generations have been flushed to tell what each sector has to be.
//!
//! The guest program writes, and notes in the plan how far it came if it ends in peace; the test notes it if not. Both verify.

use std::fmt;
use std::io;
use std::ops::Range;

use anyhow::{Context, Result, ensure};

/// Bytes in a sector, which is what a disk writes either completely or not at all.
pub const SECTOR: usize = 512;

/// Bytes that the plan takes.
pub const PLAN: usize = 4096;

/// What there is on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What all that is written follows from.
    pub seed: u64,
    /// Sectors in each region: a multiple of 8, so that regions have no page in common.
    pub sectors: u64,
    /// The regions, one behind the other.
    pub regions: Vec<Region>,
}

/// How far a region has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// The last generation of which something may have been written.
    pub begun: u64,
    /// Of those up to that, the ones of which nobody knows that they were flushed.
    pub unsure: Vec<u64>,
}

/// Sectors that are written at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which, from the beginning of the region on.
    pub sectors: Range<u64>,
    /// Whether they become zeroes.
    pub is_zero: bool,
}

/// The first sector that is not what it has to be.
#[derive(Debug)]
pub struct Damage {
    region: usize,
    sector: u64,
    found: String,
    allowed: Vec<Content>,
}

/// What a sector can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeroes,
    Generation(u64),
}

impl Plan {
    /// The plan of a disk of `size` bytes to which nothing has been written yet.
    #[must_use]
    pub fn new(seed: u64, size: u64, regions: usize) -> Self {
        const PAGE: u64 = 8;
        let sectors = (size - PLAN as u64) / SECTOR as u64 / regions as u64;
        Self {
            seed,
            sectors: sectors / PAGE * PAGE,
            regions: vec![Region::default(); regions],
        }
    }

    /// The plan in a disk's first page, if there is one.
    #[must_use]
    pub fn parse(page: &[u8]) -> Option<Self> {
        let text = str::from_utf8(page).ok()?.trim_end_matches('\0');
        let mut lines = text.lines();
        let mut head = lines.next()?.strip_prefix(HEAD)?.split_whitespace();
        let mut number = || head.next()?.parse().ok();
        let (seed, sectors) = (number()?, number()?);
        let region = |line: &str| {
            let mut numbers = line.split_whitespace().map(|word| word.parse().ok());
            Some(Region {
                begun: numbers.next()??,
                unsure: numbers.collect::<Option<_>>()?,
            })
        };
        Some(Self {
            seed,
            sectors,
            regions: lines.map(region).collect::<Option<_>>()?,
        })
    }

    /// The plan as a disk's first page.
    ///
    /// # Errors
    /// When it is too long.
    pub fn page(&self) -> Result<Vec<u8>> {
        let mut text = format!("{HEAD}{} {}\n", self.seed, self.sectors);
        for region in &self.regions {
            let numbers = [region.begun].into_iter().chain(region.unsure.clone());
            let words: Vec<_> = numbers.map(|number| number.to_string()).collect();
            text += &words.join(" ");
            text += "\n";
        }
        let mut page = text.into_bytes();
        ensure!(page.len() <= PLAN, "the plan has become too long");
        page.resize(PLAN, 0);
        Ok(page)
    }

    /// Where a sector of a region is on the disk, in bytes.
    #[must_use]
    pub fn offset(&self, region: usize, sector: u64) -> u64 {
        PLAN as u64 + (region as u64 * self.sectors + sector) * SECTOR as u64
    }

    /// What a generation of a region writes.
    #[must_use]
    pub fn runs(&self, region: usize, generation: u64) -> Vec<Run> {
        const MOST: u64 = 12;
        let mut chance = Chance::new(self.seed ^ (region as u64) << 48 ^ generation << 8);
        let count = 1 + chance.below(MOST);
        let run = |_| {
            // Most are small. The longest are longer than what goes through a buffer of the server at once.
            let length = match chance.below(32) {
                0 => 1 + chance.below(640),
                1..5 => 1 + chance.below(64),
                _ => 1 + chance.below(16),
            };
            let length = length.min(self.sectors);
            let first = chance.below(self.sectors - length + 1);
            Run {
                sectors: first..first + length,
                is_zero: chance.below(8) == 0,
            }
        };
        (0..count).map(run).collect()
    }

    /// What a run writes, unless that is zeroes.
    #[must_use]
    pub fn contents(&self, region: usize, generation: u64, run: &Run) -> Vec<u8> {
        let mut bytes = Vec::new();
        for sector in run.sectors.clone() {
            bytes.extend(self.record(region, sector, generation));
        }
        bytes
    }

    /// Checks that each sector holds what was flushed last, or something newer that was about to be, and returns how many
    /// hold something that may not have been flushed. `read` reads from an offset on the disk, in bytes.
    ///
    /// # Errors
    /// What is not so, with [`Damage`] for what is lost.
    pub fn verify(&self, mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> Result<u64> {
        const AT_ONCE: usize = 512;
        let mut unsure = 0;
        for (region, history) in self.regions.iter().enumerate() {
            let allowed = self.allowed(region, history)?;
            let mut sectors = (0..).zip(&allowed);
            let mut piece = vec![0; AT_ONCE * SECTOR];
            for (first, count) in (0..self.sectors)
                .step_by(AT_ONCE)
                .zip(allowed.chunks(AT_ONCE).map(<[_]>::len))
            {
                let piece = piece.get_mut(..count * SECTOR).context("a piece")?;
                let offset = self.offset(region, first);
                read(piece, offset).with_context(|| format!("reading at {offset}"))?;
                for (data, (sector, allowed)) in piece.chunks(SECTOR).zip(sectors.by_ref()) {
                    let found = self.check(region, sector, data, allowed)?;
                    let is_unsure = |number| history.unsure.contains(number);
                    unsure += u64::from(
                        matches!(found, Content::Generation(number) if is_unsure(&number)),
                    );
                }
            }
        }
        Ok(unsure)
    }

    /// Returns what a sector holds.
    fn check(
        &self,
        region: usize,
        sector: u64,
        data: &[u8],
        allowed: &[Content],
    ) -> Result<Content> {
        let is = |content: &&Content| match **content {
            Content::Zeroes => data.iter().all(|byte| *byte == 0),
            Content::Generation(number) => data == self.record(region, sector, number),
        };
        if let Some(content) = allowed.iter().find(is) {
            return Ok(*content);
        }
        let words = data.chunks_exact(8).take(4).map(|word| {
            let word = word.try_into().map(u64::from_le_bytes);
            format!("{:x}", word.unwrap_or_default())
        });
        Err(Damage {
            region,
            sector,
            found: words.collect::<Vec<_>>().join(" "),
            allowed: allowed.to_vec(),
        }
        .into())
    }

    /// What each sector of a region may hold.
    fn allowed(&self, region: usize, history: &Region) -> Result<Vec<Vec<Content>>> {
        let mut allowed = vec![vec![Content::Zeroes]; usize::try_from(self.sectors)?];
        for generation in 1..=history.begun {
            let is_sure = !history.unsure.contains(&generation);
            let runs = self.runs(region, generation);
            let range = |run: &Run| -> Result<Range<usize>> {
                Ok(run.sectors.start.try_into()?..run.sectors.end.try_into()?)
            };
            if is_sure {
                for run in &runs {
                    let sectors = allowed.get_mut(range(run)?).unwrap_or_default();
                    sectors.iter_mut().for_each(Vec::clear);
                }
            }
            for run in &runs {
                let content = match run.is_zero {
                    true => Content::Zeroes,
                    false => Content::Generation(generation),
                };
                // Runs of one generation may overlap, and come in any order.
                for sector in allowed.get_mut(range(run)?).unwrap_or_default() {
                    if !sector.contains(&content) {
                        sector.push(content);
                    }
                }
            }
        }
        Ok(allowed)
    }

    /// What a sector holds: the seed, which it is, the generation, and what follows from these.
    fn record(&self, region: usize, sector: u64, generation: u64) -> [u8; SECTOR] {
        let place = (region as u64) << 48 | sector;
        let head = [self.seed, place, generation];
        let mut chance = Chance::new(self.seed ^ place ^ generation << 24);
        let mut record = [0; SECTOR];
        let mut head = head.into_iter();
        for word in record.chunks_exact_mut(8) {
            let value = head.next().unwrap_or_else(|| chance.next());
            word.copy_from_slice(&value.to_le_bytes());
        }
        record
    }
}

/// How a plan begins.
const HEAD: &str = "outrigger ledger ";

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            region,
            sector,
            found,
            allowed,
        } = self;
        write!(
            f,
            "sector {sector} of region {region} begins with {found}, and is to be one of {allowed:?}"
        )
    }
}

impl std::error::Error for Damage {}

/// Numbers by chance that are the same for the same seed (`SplitMix64`).
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// Numbers that follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, which may be any.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ number >> 31
    }

    /// The next number, less than `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    /// A disk, and what is to be on it.
    struct Disk {
        plan: Plan,
        bytes: Vec<u8>,
    }

    impl Disk {
        fn new() -> Self {
            Self {
                plan: Plan::new(5, SIZE, 2),
                bytes: vec![0; SIZE.try_into().unwrap()],
            }
        }

        fn write(&mut self, region: usize, generation: u64, runs: &[Run]) {
            for run in runs {
                let at = usize::try_from(self.plan.offset(region, run.sectors.start)).unwrap();
                let mut data = self.plan.contents(region, generation, run);
                if run.is_zero {
                    data.fill(0);
                }
                self.bytes[at..at + data.len()].copy_from_slice(&data);
            }
        }

        fn is_well(&self) -> bool {
            let read = |data: &mut [u8], offset| {
                let at = usize::try_from(offset).unwrap();
                data.copy_from_slice(&self.bytes[at..][..data.len()]);
                Ok(())
            };
            self.plan.verify(read).is_ok()
        }
    }

    #[test]
    fn a_plan_survives() {
        let mut plan = Plan::new(5, SIZE, 3);
        plan.regions[1] = Region {
            begun: 7,
            unsure: vec![3, 7],
        };
        assert_eq!(Plan::parse(&plan.page().unwrap()), Some(plan));
        assert_eq!(Plan::parse(&[0; PLAN]), None);
    }

    #[test]
    fn all_that_was_flushed_has_to_be_there() {
        let mut disk = Disk::new();
        assert!(disk.is_well());
        for generation in 1..=30 {
            for region in [0, 1] {
                let runs = disk.plan.runs(region, generation);
                disk.write(region, generation, &runs);
                assert!(!disk.is_well(), "nobody said that it was to be written");
                disk.plan.regions[region].begun = generation;
                assert!(disk.is_well());
            }
        }
        // What the generation after the last would find.
        let lost = |change: &dyn Fn(&mut Disk)| {
            let mut other = Disk {
                plan: disk.plan.clone(),
                bytes: disk.bytes.clone(),
            };
            change(&mut other);
            !other.is_well()
        };
        assert!(lost(&|disk| disk.bytes[PLAN + 100] ^= 1));
        let newest = disk.plan.runs(0, 30);
        assert!(lost(&|disk| disk.write(0, 29, &newest)));
        assert!(lost(&|disk| disk.plan.regions[0].begun = 31));
        assert!(lost(&|disk| disk.plan.seed = 6));
    }

    #[test]
    fn what_was_not_flushed_may_be_there_or_not() {
        let mut disk = Disk::new();
        for generation in 1..=10 {
            let runs = disk.plan.runs(0, generation);
            disk.write(0, generation, &runs);
        }
        disk.plan.regions[0].begun = 11;
        disk.plan.regions[0].unsure = vec![11];
        assert!(disk.is_well());
        let runs = disk.plan.runs(0, 11);
        for part in runs.chunks(1) {
            disk.write(0, 11, part);
            assert!(disk.is_well());
        }
        // Whoever goes on begins another one.
        let runs = disk.plan.runs(0, 12);
        disk.write(0, 12, &runs);
        disk.plan.regions[0].begun = 12;
        assert!(disk.is_well());
        disk.plan.regions[0].unsure = vec![];
        let all_of_11 = runs.len();
        let runs = disk.plan.runs(0, 11);
        assert!(all_of_11 > 0 && !runs.is_empty());
        disk.write(0, 10, &runs[..1]);
        assert!(!disk.is_well());
    }
}
