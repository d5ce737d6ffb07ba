//! Each command in each wrong way has its error, the device lives on, and no descriptor is left over.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use support::event;
use support::raw::{access, longs, version, words};
use support::served::Served;
use vfio_user_protocol::Command;
use vfio_user_server::Options;

const ENOENT: u32 = 2;
const EINVAL: u32 = 22;
const ENOTTY: u32 = 25;
const ENOSPC: u32 = 28;

fn open_fds() -> usize {
    fs::read_dir(Path::new("/proc/self/fd")).unwrap().count()
}

/// A command, its payload, how many eventfds go with it, and the errno that it has to be refused with; 0 if it has not.
type Case = (&'static str, Command, Vec<u8>, usize, u32);

fn memory_cases() -> Vec<Case> {
    use Command::{DmaMap, DmaUnmap};
    let map = |flags: u32, offset, address, size| {
        [words(&[32, flags]), longs(&[offset, address, size])].concat()
    };
    let unmap = |flags: u32, address, size| [words(&[24, flags]), longs(&[address, size])].concat();
    vec![
        ("short", DmaMap, vec![0; 31], 0, EINVAL),
        ("no access", DmaMap, map(0, 0, 0x1000, 0x1000), 0, EINVAL),
        (
            "unknown flags",
            DmaMap,
            map(7, 0, 0x1000, 0x1000),
            0,
            EINVAL,
        ),
        ("no size", DmaMap, map(3, 0, 0x1000, 0), 0, EINVAL),
        (
            "unaligned address",
            DmaMap,
            map(3, 0, 0x1001, 0x1000),
            0,
            EINVAL,
        ),
        (
            "unaligned size",
            DmaMap,
            map(3, 0, 0x1000, 0x1001),
            0,
            EINVAL,
        ),
        (
            "unaligned offset",
            DmaMap,
            map(3, 1, 0x1000, 0x1000),
            0,
            EINVAL,
        ),
        (
            "address overflow",
            DmaMap,
            map(3, 0, 0xffff_ffff_ffff_f000, 0x2000),
            0,
            EINVAL,
        ),
        (
            "end of address space",
            DmaMap,
            map(3, 0, 0xffff_ffff_ffff_f000, 0x1000),
            0,
            EINVAL,
        ),
        ("an eventfd", DmaMap, map(3, 0, 0x1000, 0x1000), 1, EINVAL),
        (
            "two descriptors",
            DmaMap,
            map(3, 0, 0x1000, 0x1000),
            2,
            EINVAL,
        ),
        (
            "all of the address space",
            DmaMap,
            map(3, 0, 0, 0xffff_ffff_ffff_f000),
            0,
            0,
        ),
        ("short", DmaUnmap, vec![0; 23], 0, EINVAL),
        ("not mapped", DmaUnmap, unmap(0, 0x1000, 0x1000), 0, ENOENT),
        ("no size", DmaUnmap, unmap(0, 0x1000, 0), 0, ENOENT),
        (
            "overflow",
            DmaUnmap,
            unmap(0, u64::MAX, u64::MAX),
            0,
            ENOENT,
        ),
        (
            "a dirty bitmap",
            DmaUnmap,
            unmap(1, 0x1000, 0x1000),
            0,
            EINVAL,
        ),
        ("all and a bitmap", DmaUnmap, unmap(3, 0, 0), 0, EINVAL),
        (
            "all and an address",
            DmaUnmap,
            unmap(2, 0x1000, 0),
            0,
            EINVAL,
        ),
        ("all of nothing", DmaUnmap, unmap(2, 0, 0), 0, 0),
        ("a descriptor", DmaUnmap, unmap(2, 0, 0), 1, EINVAL),
    ]
}

fn info_cases() -> Vec<Case> {
    use Command::{
        DeviceGetInfo, DeviceGetIrqInfo, DeviceGetRegionInfo, DeviceGetRegionIoFds, Version,
    };
    let region = |argsz, index| words(&[argsz, 0, index, 0, 0, 0, 0, 0]);
    vec![
        ("a second time", Version, version(0, 2, ""), 0, EINVAL),
        ("short", DeviceGetInfo, vec![0; 15], 0, EINVAL),
        ("no room", DeviceGetInfo, words(&[15, 0, 0, 0]), 0, EINVAL),
        (
            "a descriptor",
            DeviceGetInfo,
            words(&[16, 0, 0, 0]),
            1,
            EINVAL,
        ),
        ("short", DeviceGetRegionInfo, vec![0; 31], 0, EINVAL),
        ("no room", DeviceGetRegionInfo, region(31, 0), 0, EINVAL),
        ("no region", DeviceGetRegionInfo, region(32, 9), 0, EINVAL),
        (
            "no region at all",
            DeviceGetRegionInfo,
            region(32, u32::MAX),
            0,
            EINVAL,
        ),
        ("too little room", DeviceGetRegionInfo, region(32, 2), 0, 0),
        ("much room", DeviceGetRegionInfo, region(u32::MAX, 2), 0, 0),
        ("short", DeviceGetRegionIoFds, vec![0; 15], 0, EINVAL),
        (
            "no room",
            DeviceGetRegionIoFds,
            words(&[15, 0, 0, 0]),
            0,
            EINVAL,
        ),
        (
            "no region",
            DeviceGetRegionIoFds,
            words(&[16, 0, 9, 0]),
            0,
            EINVAL,
        ),
        (
            "too little room",
            DeviceGetRegionIoFds,
            words(&[16, 0, 0, 0]),
            0,
            0,
        ),
        (
            "nonsense",
            DeviceGetRegionIoFds,
            words(&[u32::MAX, 9, 0, u32::MAX]),
            0,
            0,
        ),
        ("short", DeviceGetIrqInfo, vec![0; 15], 0, EINVAL),
        (
            "no room",
            DeviceGetIrqInfo,
            words(&[15, 0, 0, 0]),
            0,
            EINVAL,
        ),
        (
            "no interrupt",
            DeviceGetIrqInfo,
            words(&[16, 0, 5, 0]),
            0,
            EINVAL,
        ),
        (
            "no interrupt at all",
            DeviceGetIrqInfo,
            words(&[16, 0, u32::MAX, 0]),
            0,
            EINVAL,
        ),
    ]
}

fn interrupt_cases() -> Vec<Case> {
    use Command::DeviceSetIrqs;
    let set = |flags, index, start, count| words(&[20, flags, index, start, count]);
    let mut cases = vec![
        ("short", DeviceSetIrqs, vec![0; 19], 0, EINVAL),
        (
            "unknown flags",
            DeviceSetIrqs,
            set(0x61, 2, 0, 1),
            0,
            EINVAL,
        ),
        (
            "a vector too many",
            DeviceSetIrqs,
            set(0x21, 2, 0, 101),
            0,
            EINVAL,
        ),
        (
            "a start too far",
            DeviceSetIrqs,
            set(0x21, 2, 101, 0),
            0,
            EINVAL,
        ),
        (
            "overflow",
            DeviceSetIrqs,
            set(0x21, 2, 2, u32::MAX),
            0,
            EINVAL,
        ),
        (
            "more eventfds",
            DeviceSetIrqs,
            set(0x24, 2, 0, 1),
            2,
            EINVAL,
        ),
        (
            "fewer eventfds",
            DeviceSetIrqs,
            set(0x24, 2, 0, 2),
            1,
            EINVAL,
        ),
        (
            "eventfds for none",
            DeviceSetIrqs,
            set(0x24, 2, 0, 0),
            0,
            EINVAL,
        ),
        (
            "eventfds with none",
            DeviceSetIrqs,
            set(0x21, 2, 0, 1),
            1,
            EINVAL,
        ),
        (
            "too few booleans",
            DeviceSetIrqs,
            set(0x22, 2, 0, 1),
            0,
            EINVAL,
        ),
        (
            "disabling from the middle",
            DeviceSetIrqs,
            set(0x21, 2, 1, 0),
            0,
            EINVAL,
        ),
        (
            "masking by eventfd",
            DeviceSetIrqs,
            set(0x0c, 2, 0, 1),
            1,
            ENOTTY,
        ),
        ("errors", DeviceSetIrqs, set(0x24, 3, 0, 1), 1, EINVAL),
        ("disabling errors", DeviceSetIrqs, set(0x21, 3, 0, 0), 0, 0),
        (
            "no such kind",
            DeviceSetIrqs,
            set(0x21, u32::MAX, 0, 0),
            0,
            EINVAL,
        ),
    ];
    // Not one source and one action.
    for flags in 0..0x40_u32 {
        if (flags & 7).count_ones() != 1 || (flags >> 3).count_ones() != 1 {
            cases.push(("flags", DeviceSetIrqs, set(flags, 2, 0, 1), 0, EINVAL));
        }
    }
    cases
}

fn region_cases() -> Vec<Case> {
    use Command::{DeviceReset, DmaRead, DmaWrite, RegionRead, RegionWrite, RegionWriteMulti};
    let write = |count, data: &[u8]| [access(0, 0, count), data.to_vec()].concat();
    let multi = |count: u64, entries: &[Vec<u8>]| [longs(&[count]), entries.concat()].concat();
    let entry = |region, count| [access(region, 0, count), vec![0; 8]].concat();
    vec![
        ("short", RegionRead, vec![0; 15], 0, EINVAL),
        ("no bytes", RegionRead, access(0, 0, 0), 0, 0),
        (
            "no bytes of no region",
            RegionRead,
            access(3, 1, 0),
            0,
            EINVAL,
        ),
        ("beyond the end", RegionRead, access(0, 0xfff, 2), 0, EINVAL),
        ("overflow", RegionRead, access(0, u64::MAX, 2), 0, EINVAL),
        ("no region", RegionRead, access(u32::MAX, 0, 4), 0, EINVAL),
        (
            "too much",
            RegionRead,
            access(2, 0, (1 << 20) + 1),
            0,
            EINVAL,
        ),
        ("everything", RegionRead, access(2, 0, u32::MAX), 0, EINVAL),
        ("a descriptor", RegionRead, access(0, 0, 4), 1, EINVAL),
        ("short", RegionWrite, vec![0; 15], 0, EINVAL),
        ("no bytes", RegionWrite, write(0, &[]), 0, 0),
        (
            "less than it says",
            RegionWrite,
            write(4, &[0; 3]),
            0,
            EINVAL,
        ),
        (
            "more than it says",
            RegionWrite,
            write(4, &[0; 5]),
            0,
            EINVAL,
        ),
        (
            "everything",
            RegionWrite,
            write(u32::MAX, &[0; 4]),
            0,
            EINVAL,
        ),
        ("short", RegionWriteMulti, vec![0; 7], 0, EINVAL),
        ("nothing", RegionWriteMulti, multi(0, &[]), 0, 0),
        (
            "less than it says",
            RegionWriteMulti,
            multi(2, &[entry(0, 4)]),
            0,
            EINVAL,
        ),
        (
            "more than it says",
            RegionWriteMulti,
            multi(0, &[entry(0, 4)]),
            0,
            EINVAL,
        ),
        (
            "everything",
            RegionWriteMulti,
            multi(u64::MAX, &[]),
            0,
            EINVAL,
        ),
        (
            "half an entry",
            RegionWriteMulti,
            multi(1, &[vec![0; 23]]),
            0,
            EINVAL,
        ),
        (
            "more than fits",
            RegionWriteMulti,
            multi(1, &[entry(0, 9)]),
            0,
            EINVAL,
        ),
        (
            "no region",
            RegionWriteMulti,
            multi(1, &[entry(9, 4)]),
            0,
            EINVAL,
        ),
        (
            "a bad one later",
            RegionWriteMulti,
            multi(2, &[entry(0, 4), entry(9, 4)]),
            0,
            0,
        ),
        ("a payload", DeviceReset, vec![1; 100], 0, 0),
        ("a descriptor", DeviceReset, vec![], 1, EINVAL),
        ("the device's", DmaRead, longs(&[0, 8]), 0, EINVAL),
        ("the device's", DmaWrite, longs(&[0, 8, 1]), 0, EINVAL),
    ]
}

fn feature_cases() -> Vec<Case> {
    use Command::{DeviceFeature, MigDataRead, MigDataWrite};
    const GET: u32 = 1 << 16;
    const SET: u32 = 1 << 17;
    const PROBE: u32 = 1 << 18;
    let feature = |argsz, flags, data: &[u8]| [words(&[argsz, flags]), data.to_vec()].concat();
    let report = |argsz, iova, length, page| feature(argsz, GET | 8, &longs(&[iova, length, page]));
    let start = |page: u64, count: u32, ranges: &[u64]| {
        let head = [longs(&[page]), words(&[count, 0])].concat();
        feature(64, SET | 6, &[head, longs(ranges)].concat())
    };
    let state = |state| feature(16, SET | 2, &words(&[state, 0]));
    vec![
        ("short", DeviceFeature, vec![0; 7], 0, EINVAL),
        (
            "unknown",
            DeviceFeature,
            feature(8, GET | 9, &[]),
            0,
            ENOTTY,
        ),
        (
            "unknown flags",
            DeviceFeature,
            feature(16, GET | 1 << 19 | 1, &[]),
            0,
            EINVAL,
        ),
        (
            "no operation",
            DeviceFeature,
            feature(16, 1, &[]),
            0,
            EINVAL,
        ),
        (
            "a bare probe",
            DeviceFeature,
            feature(16, PROBE | 2, &[]),
            0,
            EINVAL,
        ),
        (
            "two operations",
            DeviceFeature,
            feature(16, GET | SET | 2, &[0; 8]),
            0,
            EINVAL,
        ),
        (
            "a probe of two",
            DeviceFeature,
            feature(8, PROBE | GET | SET | 2, &[]),
            0,
            0,
        ),
        (
            "a probe in vain",
            DeviceFeature,
            feature(8, PROBE | SET | 1, &[]),
            0,
            EINVAL,
        ),
        (
            "setting the flags",
            DeviceFeature,
            feature(16, SET | 1, &[0; 8]),
            0,
            EINVAL,
        ),
        (
            "no room for the flags",
            DeviceFeature,
            feature(15, GET | 1, &[0; 8]),
            0,
            EINVAL,
        ),
        (
            "no room for the state",
            DeviceFeature,
            feature(8, GET | 2, &[]),
            0,
            EINVAL,
        ),
        (
            "half a state",
            DeviceFeature,
            feature(12, SET | 2, &[0; 4]),
            0,
            EINVAL,
        ),
        ("state ERROR", DeviceFeature, state(0), 0, EINVAL),
        ("state RUNNING_P2P", DeviceFeature, state(5), 0, EINVAL),
        ("state PRE_COPY_P2P", DeviceFeature, state(7), 0, EINVAL),
        ("no state", DeviceFeature, state(8), 0, EINVAL),
        (
            "a log that is off",
            DeviceFeature,
            report(4096, 0, 4096, 4096),
            0,
            EINVAL,
        ),
        (
            "half a start",
            DeviceFeature,
            feature(16, SET | 6, &[0; 15]),
            0,
            EINVAL,
        ),
        ("pages of 0", DeviceFeature, start(0, 0, &[]), 0, EINVAL),
        ("pages of 3", DeviceFeature, start(3, 0, &[]), 0, EINVAL),
        (
            "missing ranges",
            DeviceFeature,
            start(4096, 1, &[]),
            0,
            EINVAL,
        ),
        (
            "many ranges",
            DeviceFeature,
            start(4096, u32::MAX, &[0, 1]),
            0,
            EINVAL,
        ),
        (
            "half a range",
            DeviceFeature,
            start(4096, 1, &[0]),
            0,
            EINVAL,
        ),
        (
            "a range too far",
            DeviceFeature,
            start(4096, 1, &[u64::MAX, 2]),
            0,
            EINVAL,
        ),
        ("the log", DeviceFeature, start(4096, 1, &[0, 4096]), 0, 0),
        (
            "half a report",
            DeviceFeature,
            feature(64, GET | 8, &[0; 23]),
            0,
            EINVAL,
        ),
        (
            "a report of nothing",
            DeviceFeature,
            report(4096, 0, 0, 4096),
            0,
            EINVAL,
        ),
        (
            "a report too far",
            DeviceFeature,
            report(4096, u64::MAX, 2, 4096),
            0,
            EINVAL,
        ),
        (
            "a report in pages of 0",
            DeviceFeature,
            report(4096, 0, 4096, 0),
            0,
            EINVAL,
        ),
        (
            "a report without room",
            DeviceFeature,
            report(39, 0, 4096, 4096),
            0,
            ENOSPC,
        ),
        (
            "a report with room",
            DeviceFeature,
            report(40, 0, 4096, 4096),
            0,
            0,
        ),
        (
            "a report of everything",
            DeviceFeature,
            report(u32::MAX, 0, u64::MAX, 1),
            0,
            ENOSPC,
        ),
        (
            "reading while running",
            MigDataRead,
            words(&[16, 8]),
            0,
            EINVAL,
        ),
        (
            "writing while running",
            MigDataWrite,
            words(&[16, 8, 0, 0]),
            0,
            EINVAL,
        ),
        ("half a read", MigDataRead, vec![0; 7], 0, EINVAL),
        ("half a write", MigDataWrite, vec![0; 7], 0, EINVAL),
        ("state STOP_COPY", DeviceFeature, state(3), 0, 0),
        (
            "too much",
            MigDataRead,
            words(&[u32::MAX, (1 << 20) + 1]),
            0,
            EINVAL,
        ),
        (
            "everything",
            MigDataRead,
            words(&[u32::MAX, u32::MAX]),
            0,
            EINVAL,
        ),
        ("without room", MigDataRead, words(&[15, 8]), 0, EINVAL),
        ("nothing", MigDataRead, words(&[8, 0]), 0, 0),
        ("state PRE_COPY", DeviceFeature, state(6), 0, EINVAL),
        ("state RESUMING", DeviceFeature, state(4), 0, 0),
        (
            "less than it says",
            MigDataWrite,
            words(&[16, 8, 0]),
            0,
            EINVAL,
        ),
        (
            "more than it says",
            MigDataWrite,
            words(&[16, 8, 0, 0, 0]),
            0,
            EINVAL,
        ),
        ("nonsense", MigDataWrite, words(&[16, 8, 77, 0]), 0, EINVAL),
        ("after nonsense", MigDataWrite, words(&[8, 0]), 0, EINVAL),
        ("state STOP", DeviceFeature, state(1), 0, EINVAL),
        ("a way out", Command::DeviceReset, vec![], 0, 0),
        ("state STOP", DeviceFeature, state(1), 0, 0),
        ("state RUNNING", DeviceFeature, state(2), 0, 0),
    ]
}

#[test]
fn each_command_in_each_wrong_way_has_its_error() {
    let served = Served::new(Options::default());
    let fds = open_fds();
    for cases in [
        memory_cases(),
        info_cases(),
        interrupt_cases(),
        region_cases(),
        feature_cases(),
    ] {
        let mut raw = served.agreed();
        for (name, command, payload, events, errno) in cases {
            let events: Vec<_> = (0..events).map(|_| event()).collect();
            let events: Vec<_> = events.iter().map(AsFd::as_fd).collect();
            let answer = raw.call(command as u16, &payload, &events);
            assert_eq!(answer.errno(), errno, "{command:?}: {name}");
            assert_eq!(answer.header.id, 7);
            raw.check_alive();
        }
    }
    // The server may not have noticed yet that the last client has gone.
    served.agreed().check_alive();
    assert!(
        open_fds() <= fds + 3,
        "{} descriptors are left over",
        open_fds() - fds
    );
}
