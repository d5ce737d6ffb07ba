//! Integration tests, the lab and the benchmarks.
#![forbid(unsafe_code)]

pub mod api;
pub mod backend_contract;
pub mod crossing;
pub mod device_thread;
pub mod faults;
pub mod foreign;
pub mod lab;
pub mod migration_contract;
pub mod outrigger;
pub mod saved;
pub mod skipped;
pub mod tapped_socket;
mod threads;
pub mod tiny;
pub mod travels;
pub mod truncator;
