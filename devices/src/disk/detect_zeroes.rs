//! `detect-zeroes=`: a write of nothing but zeroes becomes a write-zeroes operation, which moves no data.
//!
//! A capability: a layer over a disk, which `open` adds if the option is given.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::layer::{EngineLayer, Layer, LayeredDisk};
use super::{
    Completion, DetectZeroes, DiscardMode, Disk, Engine, GuestRange, OpenOptions, OpenReason,
    Operation, Transfer,
};
use crate::GuestMemory;

/// The layer. With `unmap`, blocks of zeroes are deallocated.
#[derive(Clone)]
struct ZeroDetection {
    unmap: bool,
}

/// The layer's part in one worker's engine.
struct EngineZeroDetection {
    unmap: bool,
    memory: GuestMemory,
}

/// Refuses to unmap blocks of zeroes where discards do not reach the image.
pub(super) fn check(options: &OpenOptions) -> Result<(), OpenReason> {
    match (options.detect_zeroes, options.discard) {
        (DetectZeroes::Unmap, DiscardMode::Ignore) => Err(OpenReason::UnmapWithoutDiscard),
        _ => Ok(()),
    }
}

/// Adds the layer to `disk`, unless `mode` is off.
pub(super) fn over(disk: Arc<dyn Disk>, mode: DetectZeroes) -> Arc<dyn Disk> {
    match mode {
        DetectZeroes::Off => disk,
        mode => {
            let layer = ZeroDetection { unmap: mode == DetectZeroes::Unmap };
            Arc::new(LayeredDisk { disk, layer })
        }
    }
}

impl Layer for ZeroDetection {
    type Engine = EngineZeroDetection;

    fn engine(&self, _: &dyn Engine, memory: GuestMemory, _: u32) -> io::Result<Self::Engine> {
        Ok(EngineZeroDetection { unmap: self.unmap, memory })
    }
}

impl EngineLayer for EngineZeroDetection {
    fn submit(&mut self, engine: &mut dyn Engine, transfer: Transfer<'_>) {
        let operation = match transfer.operation {
            Operation::Write { durable } if is_zero(&self.memory, transfer.ranges) => {
                Operation::WriteZeroes { unmap: self.unmap, durable }
            }
            other => other,
        };
        let ranges = if operation == transfer.operation { transfer.ranges } else { &[] };
        engine.submit(Transfer { operation, ranges, ..transfer });
    }

    fn complete(&mut self, _: &mut Vec<Completion>, _: usize) {}
}

/// Whether all bytes in `ranges` are zero. If the guest writes to them meanwhile, the result is that of the old or the new bytes.
fn is_zero(memory: &GuestMemory, ranges: &[GuestRange]) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut copy = [0; ZEROES.len()];
    ranges.iter().all(|range| {
        (0..range.length).step_by(copy.len()).all(|at| {
            let copy = &mut copy[..((range.length - at) as usize).min(ZEROES.len())];
            let address = GuestAddress(range.address.0 + u64::from(at));
            // The engine refuses ranges outside of guest memory.
            memory.read_slice(copy, address).is_ok() && *copy == ZEROES[..copy.len()]
        })
    })
}
