//! The first vCPU's registers, as pure values, and every vCPU's CPUID.
//!
//! The other vCPUs need no registers: they wait for the guest's INIT-SIPI (SDM 3A §9.4), which the in-kernel local APIC
//! delivers.

pub mod changeable_msrs;
pub mod cpuid;
pub mod gdt;
pub mod lapic;
pub mod msrs;
pub mod paging;
pub mod regs;
