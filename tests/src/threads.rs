//! What the threads of the programs under test are doing, for whoever looks into why one of them hangs.

use std::fs;
use std::path::{Path, PathBuf};

/// Prints a line for each thread: its process, its name, its state and its CPU time in ticks, as in `/proc/PID/stat`, and
/// where in the kernel it sleeps.
pub(crate) fn print() {
    for process in folders(Path::new("/proc")) {
        if !read(&process, "comm").starts_with("outrigger") {
            continue;
        }
        for thread in folders(&process.join("task")) {
            println!("  ~ {}: {}", thread.display(), describe(&thread));
        }
    }
}

fn describe(thread: &Path) -> String {
    let stat = read(thread, "stat");
    // A name may have blanks and brackets in it.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let field = |number: usize| fields.split(' ').nth(number).unwrap_or("?");
    let (state, user, system) = (field(0), field(11), field(12));
    let (name, place) = (read(thread, "comm"), read(thread, "wchan"));
    format!("{name} {state} {user} {system} {place}")
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// It may end at any moment.
fn read(path: &Path, file: &str) -> String {
    let text = fs::read_to_string(path.join(file)).unwrap_or_default();
    text.trim_end().to_owned()
}
