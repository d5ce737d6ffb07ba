//! A client that does everything wrong: each command in each wrong way has its error, and the device lives on.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use support::raw::{Raw, access, longs, message, version, words};
use support::{Everything, event, memfd, register, serve};
use tempfile::TempDir;
use vfio_user_protocol::{Command, DmaAccess, Header, MessageFlags, take};
use vfio_user_server::{Ended, Listener, Options, Stopper};
use zerocopy::IntoBytes;

const E2BIG: u32 = 7;
const ENOENT: u32 = 2;
const EIO: u32 = 5;
const EEXIST: u32 = 17;
const EINVAL: u32 = 22;
const ENOTTY: u32 = 25;
const ENOSPC: u32 = 28;

/// A server of a device with everything, at a path.
struct Served {
    _folder: TempDir,
    path: PathBuf,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn new(options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        let mut server = Everything::server(options);
        let stopper = server.stopper();
        let thread = thread::spawn(move || server.run(&listener).unwrap());
        Self {
            _folder: folder,
            path,
            stopper,
            thread: Some(thread),
        }
    }

    fn connect(&self) -> Raw {
        Raw::new(UnixStream::connect(&self.path).unwrap())
    }

    fn agreed(&self) -> Raw {
        let mut raw = self.connect();
        raw.agree("\"max_msg_fds\":8");
        raw
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

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

#[test]
fn unknown_commands_are_refused() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    for command in [0, 14, 19, 255, u16::MAX] {
        let answer = raw.call(command, &[1; 100], &[]);
        assert_eq!((answer.errno(), answer.header.command), (EINVAL, command));
    }
    raw.check_alive();
}

#[test]
fn nothing_is_done_before_a_version_is_agreed_on() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    for command in (0..20).filter(|command| *command != 1) {
        assert_eq!(raw.call(command, &[0; 64], &[]).errno(), EINVAL);
    }
    raw.agree("");
    raw.check_alive();
}

#[test]
fn versions_that_cannot_be_spoken_end_the_connection() {
    let served = Served::new(Options::default());
    for payload in [
        vec![0; 3],
        version(1, 0, ""),
        version(u16::MAX, 2, ""),
        b"\0\0\0\0{}".to_vec(),
        b"\0\0\0\0{\0".to_vec(),
        b"\0\0\0\0[[[[\0".to_vec(),
        version(0, 2, "\"max_msg_fds\":-1"),
        version(0, 2, "\"max_msg_fds\":\"1\""),
        version(0, 2, "\"max_data_xfer_size\":7"),
        version(0, 2, "\"pgsizes\":65536"),
        version(0, 2, &"\"x\":1,".repeat(10_000)),
    ] {
        let mut raw = served.connect();
        let answer = raw.call(Command::Version as u16, &payload, &[]);
        assert_eq!(answer.errno(), EINVAL, "{}", payload.escape_ascii());
        assert!(raw.receive().is_none());
    }
    served.agreed().check_alive();
}

#[test]
fn the_answer_to_a_version_is_short_and_names_what_was_proposed() {
    let served = Served::new(Options::default());
    // What QEMU 11.1 proposes, and a twin socket.
    let everything = "\"pgsizes\": 4096, \"max_msg_fds\": 16, \"max_dma_maps\": 65535, \
        \"max_data_xfer_size\": 1048576, \"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \
        \"write_multiple\": true, \"twin_socket\": {\"supported\": true}";
    let answer = served.connect().agree(everything);
    assert!(
        Header::SIZE + answer.payload.len() <= 190,
        "{}",
        answer.payload.len()
    );
    assert_eq!(answer.fds.len(), 1);
    let expected = version(
        0,
        2,
        "\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"max_dma_maps\":1024,\"pgsizes\":4096,\
        \"write_multiple\":true,\"twin_socket\":{\"supported\":true,\"fd_index\":0}",
    );
    assert_eq!(
        answer.payload.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );

    let nothing = served.connect().agree("");
    assert_eq!(nothing.payload, version(0, 2, ""));
    let some = served
        .connect()
        .agree("\"max_msg_fds\":0,\"write_multiple\":false,\"twin_socket\":{\"supported\":true}");
    assert_eq!(some.payload, version(0, 2, "\"max_msg_fds\":16"));
    // No capabilities at all, and another minor version.
    for (minor, answered) in [(0, 0), (1, 1), (9, 2)] {
        let mut raw = served.connect();
        let payload = words(&[minor << 16]);
        let answer = raw.call(Command::Version as u16, &payload, &[]);
        assert_eq!(answer.payload, version(0, answered, ""));
        raw.check_alive();
    }
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let served = Served::new(Options::default());
    let good = Header::command(1, Command::DeviceReset, 0);
    for header in [
        Header { size: 15, ..good },
        Header { size: 0, ..good },
        Header { flags: 2, ..good },
        Header { flags: 0xf, ..good },
    ] {
        let mut raw = served.agreed();
        raw.send(header.as_bytes(), &[]);
        assert!(raw.receive().is_none());
    }
    served.agreed().check_alive();
}

#[test]
fn messages_that_are_too_long_are_skipped() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    let answer = raw.call(Command::RegionWrite as u16, &vec![1; 5 << 20], &[]);
    assert_eq!(answer.errno(), E2BIG);
    raw.check_alive();
}

#[test]
fn messages_may_come_byte_by_byte() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    let commands = [
        message(
            Command::RegionWrite as u16,
            &[access(0, 0, 4), vec![1, 2, 3, 4]].concat(),
        ),
        message(Command::RegionRead as u16, &access(0, 0, 4)),
    ];
    for byte in commands.concat() {
        raw.send(&[byte], &[]);
    }
    assert_eq!(raw.receive().unwrap().errno(), 0);
    assert_eq!(raw.receive().unwrap().payload[16..], [1, 2, 3, 4]);
}

#[test]
fn descriptors_may_come_with_any_byte_of_their_message() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    let map = message(Command::DmaMap as u16, &map);
    let unmap = message(
        Command::DmaUnmap as u16,
        &[words(&[24, 0]), longs(&[0x1000, 0x1000])].concat(),
    );
    let file = memfd(0x1000);
    for cut in 0..map.len() {
        raw.send(&map[..cut], &[]);
        raw.send(&map[cut..], &[file.as_fd()]);
        raw.send(&unmap, &[]);
        let answers = [
            raw.receive().unwrap().errno(),
            raw.receive().unwrap().errno(),
        ];
        assert_eq!(answers, [0, 0], "{cut}");
    }
}

#[test]
fn posted_commands_have_no_answer_whatever_they_are() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    for command in (0..20).chain([99]) {
        let mut bytes = message(command, &[0; 40]);
        bytes[8] = u8::try_from(MessageFlags::NO_REPLY.bits()).unwrap();
        raw.send(&bytes, &[]);
    }
    raw.check_alive();
}

#[test]
fn replies_that_nobody_waits_for_are_dropped() {
    let served = Served::new(Options::default());
    let mut raw = served.agreed();
    for id in 0..1000 {
        let command = Header::command(id, Command::DmaRead, 0);
        raw.send(&[command.reply(8).as_bytes(), &[0; 8]].concat(), &[]);
    }
    raw.check_alive();
}

#[test]
fn more_mappings_than_agreed_on_are_refused() {
    let served = Served::new(Options {
        max_mappings: 3,
        ..Options::default()
    });
    let mut raw = served.agreed();
    let map = |at: u64| [words(&[32, 3]), longs(&[0, at << 12, 0x1000])].concat();
    let errnos = [1, 2, 3, 4].map(|at| raw.call(Command::DmaMap as u16, &map(at), &[]).errno());
    assert_eq!(errnos, [0, 0, 0, ENOSPC]);
    let again = raw.call(Command::DmaMap as u16, &map(2), &[]).errno();
    assert!([EEXIST, ENOSPC].contains(&again));
}

#[test]
fn a_client_that_does_not_read_is_dropped() {
    let (stream, thread) = serve(Everything::server(Options {
        send_deadline: Duration::from_millis(100),
        ..Options::default()
    }));
    let mut raw = Raw::new(stream);
    raw.agree("");
    raw.0.set_write_timeout(Some(support::LONG)).unwrap();
    let read = message(Command::RegionRead as u16, &access(2, 0, 0x4000));
    // Until the server closes the connection.
    while rustix::io::write(&raw.0, &read).is_ok() {}
    assert_eq!(thread.join().unwrap().1, Ended::Stuck);
}

/// Lets the device read guest memory by a message, and answers as `script` says.
fn asked(
    options: Options,
    script: impl FnOnce(&mut Raw, Header, DmaAccess),
) -> (
    u32,
    Raw,
    JoinHandle<(vfio_user_server::Server<Everything>, Ended)>,
) {
    let (stream, thread) = serve(Everything::server(options));
    let mut raw = Raw::new(stream);
    raw.agree("");
    let write = |raw: &mut Raw, region, offset, value: u64| {
        let payload = [access(region, offset, 8), longs(&[value])].concat();
        raw.send(&message(Command::RegionWrite as u16, &payload), &[]);
    };
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    assert_eq!(raw.call(Command::DmaMap as u16, &map, &[]).errno(), 0);
    for (region, offset, value) in [
        (7, 0, 6 << 32),
        (0, register::ADDRESS, 0x1010),
        (0, register::LENGTH, 4),
    ] {
        write(&mut raw, region, offset, value);
        assert_eq!(raw.receive().unwrap().errno(), 0);
    }
    write(&mut raw, 0, register::SUM, 0);
    let asked = raw.receive().unwrap();
    assert_eq!(asked.header.command, Command::DmaRead as u16);
    let (access, _) = take::<DmaAccess>(&asked.payload).unwrap();
    assert_eq!((access.address, access.count), (0x1010, 4));
    script(&mut raw, asked.header, access);
    let answer = raw.receive().map_or(u32::MAX, |answer| answer.errno());
    (answer, raw, thread)
}

#[test]
fn wrong_answers_to_the_devices_commands_are_its_errors() {
    let options = Options {
        memory_deadline: Duration::from_millis(200),
        ..Options::default()
    };
    let reply =
        |header: Header, payload: &[u8]| [header.reply(payload.len()).as_bytes(), payload].concat();
    let good = |access: DmaAccess| [access.as_bytes(), &[1, 2, 3, 4]].concat();
    type Script = Box<dyn Fn(Header, DmaAccess) -> Vec<u8>>;
    let scripts: [(&str, u32, Script); 9] = [
        (
            "a good one",
            0,
            Box::new(move |header, access| reply(header, &good(access))),
        ),
        ("none", EIO, Box::new(|_, _| Vec::new())),
        (
            "an error",
            EIO,
            Box::new(|header, _| header.refusal(14).as_bytes().to_vec()),
        ),
        (
            "nothing",
            EIO,
            Box::new(move |header, _| reply(header, &[])),
        ),
        (
            "too little",
            EIO,
            Box::new(move |header, access| reply(header, &good(access)[..19])),
        ),
        (
            "too much",
            EIO,
            Box::new(move |header, access| reply(header, &[good(access), vec![0]].concat())),
        ),
        (
            "another count",
            EIO,
            Box::new(move |header, access| reply(header, &good(DmaAccess { count: 5, ..access }))),
        ),
        (
            "another address",
            EIO,
            Box::new(move |header, access| {
                reply(
                    header,
                    &good(DmaAccess {
                        address: 0,
                        ..access
                    }),
                )
            }),
        ),
        (
            "another id",
            EIO,
            Box::new(move |header, access| {
                reply(
                    Header {
                        id: header.id ^ 1,
                        ..header
                    },
                    &good(access),
                )
            }),
        ),
    ];
    for (name, errno, script) in scripts {
        let (answer, mut raw, _) = asked(options, |raw, header, access| {
            let bytes = script(header, access);
            if !bytes.is_empty() {
                raw.send(&bytes, &[]);
            }
        });
        assert_eq!(answer, errno, "{name}");
        raw.check_alive();
    }
}

#[test]
fn commands_that_come_while_the_device_waits_are_done_later() {
    let (answer, mut raw, _) = asked(Options::default(), |raw, header, access| {
        raw.send(&message(Command::RegionRead as u16, &read_ids()), &[]);
        let payload = [access.as_bytes(), &[1, 2, 3, 4]].concat();
        raw.send(
            &[header.reply(payload.len()).as_bytes(), &payload[..]].concat(),
            &[],
        );
    });
    assert_eq!(answer, 0);
    assert_eq!(raw.receive().unwrap().payload[16..], [0x52, 0x4f]);
    raw.check_alive();
}

fn read_ids() -> Vec<u8> {
    access(7, 0, 2)
}

#[test]
fn a_flood_of_commands_while_the_device_waits_ends_the_connection() {
    let start = Instant::now();
    let (_, _, thread) = asked(Options::default(), |raw, _, _| {
        let read = message(
            Command::RegionWrite as u16,
            &[access(2, 0, 0x1000), vec![0; 0x1000]].concat(),
        );
        while rustix::io::write(&raw.0, &read).is_ok() {}
    });
    let (server, ended) = thread.join().unwrap();
    assert_eq!(ended, Ended::Flood);
    assert!(start.elapsed() < support::LONG);
    drop(server);
}

#[test]
fn a_client_that_goes_in_the_middle_of_anything_leaves_the_server_alive() {
    let served = Served::new(Options::default());
    let file: File = memfd(0x1000);
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    let map = message(Command::DmaMap as u16, &map);
    for cut in 0..map.len() {
        let mut raw = served.agreed();
        raw.send(&map[..cut.max(1)], &[file.as_fd()]);
    }
    served.agreed().check_alive();
}

#[test]
fn a_client_that_takes_no_descriptors_is_sent_none() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    raw.agree("\"max_msg_fds\":0,\"twin_socket\":{\"supported\":true}");
    let info = words(&[4096, 0, 2, 0, 0, 0, 0, 0]);
    let info = raw.call(Command::DeviceGetRegionInfo as u16, &info, &[]);
    assert_eq!(info.payload, words(&[32, 3, 2, 0, 0x4000, 0, 0, 0]));
    let bells = raw.call(
        Command::DeviceGetRegionIoFds as u16,
        &words(&[4096, 0, 0, 0]),
        &[],
    );
    assert_eq!(bells.payload, words(&[16, 0, 0, 0]));
    // The device works by messages alone.
    let ring = [access(0, register::DOORBELLS, 4), vec![0; 4]].concat();
    assert_eq!(raw.call(Command::RegionWrite as u16, &ring, &[]).errno(), 0);
    let rung = raw.call(
        Command::RegionRead as u16,
        &access(0, register::BELLS, 4),
        &[],
    );
    assert_eq!(rung.payload[16..], [1, 0, 0, 0]);
}

#[test]
fn as_many_doorbells_are_offered_as_the_client_takes_descriptors() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    // The default is one.
    raw.agree("");
    let bells = raw.call(
        Command::DeviceGetRegionIoFds as u16,
        &words(&[4096, 0, 0, 0]),
        &[],
    );
    assert_eq!((bells.fds.len(), bells.payload.len()), (1, 16 + 40));
}

#[test]
fn the_clients_limit_is_kept_where_it_does_not_ask() {
    let served = Served::new(Options::default());
    let mut raw = served.connect();
    raw.agree("\"max_data_xfer_size\":64");
    let mut read = |count| {
        raw.call(Command::RegionRead as u16, &access(2, 0, count), &[])
            .errno()
    };
    // What it asks for itself is limited by what is offered.
    assert_eq!([read(0x4000), read((1 << 20) + 1)], [0, EINVAL]);
    let write = [access(2, 0, 0x4000), vec![1; 0x4000]].concat();
    let write = raw.call(Command::RegionWrite as u16, &write, &[]);
    assert_eq!(write.errno(), 0);
    let map = [words(&[32, 3]), longs(&[0, 0x1000, 0x1000])].concat();
    assert_eq!(raw.call(Command::DmaMap as u16, &map, &[]).errno(), 0);
    for (region, offset, value) in [
        (7, 0, 6 << 32),
        (0, register::ADDRESS, 0x1000),
        (0, register::LENGTH, 100),
        (0, register::FILL, 5),
    ] {
        let payload = [access(region, offset, 8), longs(&[value])].concat();
        raw.send(&message(Command::RegionWrite as u16, &payload), &[]);
        if offset != register::FILL {
            assert_eq!(raw.receive().unwrap().errno(), 0);
        }
    }
    for (address, count) in [(0x1000, 64), (0x1040, 36)] {
        let asked = raw.receive().unwrap();
        let (access, data) = take::<DmaAccess>(&asked.payload).unwrap();
        assert_eq!((access.address, access.count), (address, count));
        assert_eq!(data.len() as u64, count);
        // By the letter of the specification, this reply has 12 bytes.
        let reply = &access.as_bytes()[..12];
        raw.send(
            &[asked.header.reply(reply.len()).as_bytes(), reply].concat(),
            &[],
        );
    }
    assert_eq!(raw.receive().unwrap().errno(), 0);
}
