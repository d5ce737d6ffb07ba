//! Register accesses allocate nothing, once the connection has warmed up.

#![expect(
    unsafe_code,
    reason = "an allocator that counts has to be an allocator"
)]
#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Barrier;
use std::thread;

use support::{LONG, Memory, connect, options};

/// The system's allocator, which counts for each thread what it is asked for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of this very method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn register_accesses_allocate_nothing() {
    const THREADS: usize = 8;
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| peer.serve());
    let accesses = || {
        for offset in 0..200 {
            let mut data = [0; 8];
            client.region_read(0, offset, &mut data).unwrap();
            client.region_write(0, offset, &data).unwrap();
            client.region_post(0, offset, &data).unwrap();
        }
    };
    let warm = Barrier::new(THREADS);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                accesses();
                warm.wait();
                let before = ALLOCATIONS.get();
                accesses();
                assert_eq!(ALLOCATIONS.get(), before);
            });
        }
    });
    drop(client);
    server.join().unwrap();
}
