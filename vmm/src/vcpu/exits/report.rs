//! Shows how often each vCPU left KVM: `--verbose` at the end, and QMP at any time.
//!
//! A capability: the vCPU's loop counts, and runs without this.

use std::fmt;

use devices::counter::Counter;

use super::super::setup::Vcpu;
use super::{Exits, NAMES};

impl Exits {
    pub(crate) fn by_reason(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.into_iter().zip(self.0.iter().map(Counter::get))
    }
}

impl fmt::Display for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [reads, writes, port_reads, port_writes, other] = self.0.each_ref().map(Counter::get);
        write!(
            f,
            "{reads} MMIO reads, {writes} MMIO writes, {port_reads} port reads, {port_writes} port writes, {other} others"
        )
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        tracing::debug!(vcpu = self.index, exits = %self.exits, "exits to user space");
    }
}
