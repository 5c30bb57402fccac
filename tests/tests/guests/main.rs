//! Real Linux guests through the real binary, on a CPU with hardware virtualization or in the lab (`make test-guests`).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod boot;
mod container;
mod control;
mod cpu_pm;
mod debian;
mod demo;
mod disk;
mod disk_faults;
mod ends;
mod exec;
mod fio;
mod formats;
mod gdb;
mod lab;
mod many_disks;
mod nested;
mod network_storage;
mod polled_queue;
mod powercut;
mod powercut_sound;
mod saved;
mod trace;
