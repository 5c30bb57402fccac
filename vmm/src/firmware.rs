//! What firmware does on a PC: at power-on and after each reset it puts into memory what the guest starts from.

use std::fs::File;
use std::path::Path;

use arch::boot::{self, Entry, Kernel};
use arch::layout::{self, MmioDevice};
use arch::tables::{acpi, mptable};
use rustix::mm::{Advice, madvise};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::GuestMemory;
use crate::config::{DiskConfig, VmConfig};
use crate::error::Error;

/// Everything that the guest starts from. The files stay open: a reset reads them again.
pub(crate) struct Firmware {
    /// The machine to describe.
    pub config: VmConfig,
    /// The kernel image.
    pub kernel: Kernel,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl Firmware {
    /// Describes the machine, loads the kernel and writes its start structures. Says where the boot vCPU begins.
    ///
    /// # Errors
    /// Something does not fit, or a file cannot be read.
    pub(crate) fn load(&self, memory: &GuestMemory) -> Result<Entry, Error> {
        let rsdp = self.describe_machine(memory)?;
        boot::load(memory, &self.kernel, self.initrd.as_ref(), &self.cmdline, rsdp).map_err(not_loaded(&self.config))
    }

    /// Writes the ACPI tables, or the MPTable for `--acpi off`. Gives the RSDP.
    fn describe_machine(&self, memory: &GuestMemory) -> Result<Option<GuestAddress>, Error> {
        let config = &self.config;
        if config.acpi {
            let virtio_mmio = windows(&config.disks);
            let machine = acpi::Machine { cpus: config.cpus, serial: config.has_serial(), virtio_mmio: &virtio_mmio };
            Ok(Some(acpi::write(memory, &machine)?))
        } else {
            mptable::write(memory, config.cpus)?;
            Ok(None)
        }
    }
}

/// Where each disk sits.
pub(crate) fn windows(disks: &[DiskConfig]) -> Vec<MmioDevice> {
    (0..disks.len()).map_while(layout::virtio_mmio).collect()
}

/// Puts the option that named a file before what is wrong with it.
pub(crate) fn in_file(option: &'static str, path: &Path) -> impl FnOnce(boot::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::BootFile { option, path, source }
}

/// Names the option that named what cannot be loaded.
fn not_loaded(config: &VmConfig) -> impl FnOnce(boot::Error) -> Error {
    use boot::Error::{CopyInitrd, EmptyInitrd, InitrdDoesNotFit, InitrdNeverFits, ReadInitrd};
    move |error| match (error, &config.initrd) {
        (boot::Error::Cmdline(error), _) => Error::Cmdline(error),
        (
            error
            @ (ReadInitrd(_) | EmptyInitrd | InitrdDoesNotFit { .. } | InitrdNeverFits { .. } | CopyInitrd { .. }),
            Some(initrd),
        ) => in_file("--initrd", initrd)(error),
        (error, _) => in_file("--kernel", &config.kernel)(error),
    }
}

/// Gives all guest RAM back to the host: what the guest finds there next is zeroes, or its kernel. No vCPU runs, and no
/// device has anything in flight.
///
/// # Errors
/// When the host refuses.
#[expect(unsafe_code, reason = "the content of mapped memory changes")]
pub(crate) fn clear_memory(memory: &GuestMemory) -> Result<(), Error> {
    for region in memory.iter() {
        if region.flags() & libc::MAP_HUGETLB != 0 {
            // These go back to a pool from which somebody else may take them.
            clear(memory, region.start_addr(), region.len())?;
            continue;
        }
        let (start, length) = (region.as_ptr().cast(), region.len() as usize);
        // SAFETY: the region is private mappings of ours, whole: anonymous memory, which reads as zeroes afterwards, and the
        // kernel's file, as which it does (madvise(2), MADV_DONTNEED). There are no Rust references into guest memory,
        // whose content may change any time.
        unsafe { madvise(start, length, Advice::LinuxDontNeed) }
            .map_err(|error| Error::Host { what: "clear guest memory", source: error.into() })?;
    }
    Ok(())
}

/// Writes zeroes.
fn clear(memory: &GuestMemory, start: GuestAddress, length: u64) -> Result<(), Error> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    for at in (0..length).step_by(ZEROES.len()) {
        let piece = &ZEROES[..ZEROES.len().min((length - at) as usize)];
        let written = memory.write_slice(piece, GuestAddress(start.0 + at));
        written.map_err(std::io::Error::other).map_err(Error::host("clear guest memory"))?;
    }
    Ok(())
}
