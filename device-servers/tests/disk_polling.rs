//! The disk's thread looks for requests for a little while before it sleeps. This is a process of its own, to see what that
//! uses of processors.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

#[path = "support/drive.rs"]
mod drive;
mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::hint;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use drive::{DATA, Disk, IN, Image, OK, USUAL, pattern};
use support::{BUFFERS, EVENT_IDX, LONG};

/// Long enough to see who does not rest.
const WHILE: Duration = Duration::from_millis(500);

#[test]
fn no_request_is_lost_wherever_a_look_ends() {
    let _turn = turn();
    let image = Image::new();
    for features in [USUAL, USUAL | EVENT_IDX] {
        let mut disk = Disk::new(&image.options(), features);
        for round in 0..4000 {
            // As soon as can be, so that the thread looks, and then at any moment from before it ends to after that.
            for delay in [0, 0, round % 400] {
                let moment = Instant::now() + Duration::from_nanos(100 * delay);
                while Instant::now() < moment {
                    hint::spin_loop();
                }
                // Fails if there is no interrupt.
                let sector = round % 1000;
                assert_eq!(disk.read(sector, 512), (OK, pattern(sector, 0)));
            }
        }
    }
}

#[test]
fn a_driver_that_is_quick_need_not_notify() {
    let _turn = turn();
    let image = Image::new();
    for features in [USUAL, USUAL | EVENT_IDX] {
        let mut disk = Disk::new(&image.options(), features);
        let start = Instant::now();
        let mut requests = 0;
        while disk.queues[0].kicks + 500 > requests {
            assert!(start.elapsed() < LONG, "all but a few were notified of");
            run_at_once(&mut disk);
            requests += 1;
        }
    }
}

#[test]
fn a_disk_that_nothing_is_asked_of_rests() {
    let _turn = turn();
    let image = Image::new();
    let mut disk = Disk::new(&image.options(), USUAL | EVENT_IDX);
    for _ in 0..1000 {
        run_at_once(&mut disk);
    }
    let before = wanted();
    thread::sleep(WHILE);
    // (Threads of earlier tests may end meanwhile.)
    let since = |(task, time): (_, u64)| time - before.get(&task).copied().unwrap_or(0);
    let wanted = Duration::from_nanos(wanted().into_iter().map(since).sum());
    assert!(wanted < WHILE / 5, "somebody does not rest: {wanted:?}");
}

/// Each test has the process for itself.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does one request, whose end is not waited for in sleep.
fn run_at_once(disk: &mut Disk) {
    let buffers = disk.request(BUFFERS, IN, 0, &[(DATA, 512)]);
    let queue = &mut disk.queues[0];
    queue.add(&buffers);
    queue.kick();
    let start = Instant::now();
    while queue.pop().is_none() {
        assert!(start.elapsed() < LONG, "a request was lost");
        hint::spin_loop();
    }
}

/// How many nanoseconds each thread of this process has had a CPU, or waited for one that others had (proc_pid_schedstat).
fn wanted() -> BTreeMap<OsString, u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let times = tasks.filter_map(|task| {
        let task = task.unwrap();
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let times = times.split_whitespace().take(2);
        let time = times.map(|time| time.parse::<u64>().unwrap()).sum();
        Some((task.file_name(), time))
    });
    times.collect()
}
