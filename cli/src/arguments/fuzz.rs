//! Values of options that are anything, and what those that pass promise.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use minivmm_fuzz::Input;
use vmm::WithCauses;

use super::disk::{Context, DiskOption, split};
use super::value;

const WORDS: &[&str] = &[
    "a.img",
    ",",
    ",,",
    "=",
    "on",
    "off",
    "format",
    "qcow2",
    "cache",
    "none",
    "serial",
    "num-queues",
    "queue-size",
    "throttling.",
    "bps-total",
    "-max",
    "-max-length",
    "iops-size",
    "cyls",
    "heads",
    "secs",
    "1",
    "0",
    "9",
    "K",
    "G",
    ".",
    "werror",
    "stop",
    "enospc",
];

fn value(input: &mut Input<'_>) -> Vec<u8> {
    let mut value = Vec::new();
    while !input.is_empty() {
        match usize::from(input.u8()) {
            word if word < WORDS.len() => value.extend_from_slice(WORDS[word].as_bytes()),
            byte => value.push(byte as u8),
        }
    }
    value
}

#[test]
fn options() {
    minivmm_fuzz::run("cli/options", |input| {
        let control = input.bool();
        let bytes = value(input);
        let parts = split(&bytes);
        let doubled: Vec<_> = parts
            .iter()
            .map(|part| {
                part.iter()
                    .flat_map(|byte| vec![*byte; 1 + usize::from(*byte == b',')])
                    .collect::<Vec<u8>>()
            })
            .collect();
        let text = OsStr::from_bytes(&bytes);
        match DiskOption::parse(text) {
            Ok(disk) => {
                assert!(!parts[0].is_empty());
                let again = DiskOption::parse(OsStr::from_bytes(&doubled.join(&b','))).unwrap();
                assert_eq!(format!("{disk:?}"), format!("{again:?}"));
                if let Ok(config) = disk.into_config(27, Context { cpus: 3, control }) {
                    assert!(!config.id.is_empty() && config.device.name == "vdab");
                    assert_eq!(config.image.path.as_os_str().as_bytes(), parts[0]);
                    assert_eq!(config.device.write_cache, config.image.cache.writeback());
                }
            }
            Err(error) => {
                let _ = WithCauses(&error).to_string();
                assert!(!parts[0].is_empty() || matches!(error, value::ValueError::NoPath));
            }
        }
        let Some(text) = text.to_str() else { return };
        if let Ok(memory) = value::memory(text) {
            assert!(memory >= 16 << 20 && memory.is_multiple_of(4096), "{memory}");
        }
        if let Ok(duration) = value::duration(text) {
            assert!(!duration.is_zero());
        }
        if let Ok(bytes) = value::bytes::<u32>(text) {
            assert_eq!(value::bytes::<u64>(text), Ok(bytes.into()));
        }
    });
}
