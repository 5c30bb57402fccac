//! `--explain`: a machine as text, and as the values of a picture, read from the machine itself.
//!
//! A capability. `cli` calls [`explain`] instead of running the machine. [`explain`] builds it, as a run would, and then reads everything
//! from what was built: registers from KVM, memory from the placement plan, features and configuration spaces from the disks' registers,
//! threads and descriptors from /proc/self, system calls from the filters' lists. So the text cannot differ from what would run, except
//! for the threads `save` (with `--qmp`) and `trace` (with `--trace`), which only a run has.
//!
//! What a run would leave behind is left out: no socket is bound, and no file of a console or a dump is created or emptied. Images are
//! opened and locked, because whether they can be is part of the answer.

mod disks;
mod process;
mod regions;
mod rows;

use arch::boot::Protocol;
use arch::layout;
use arch::machine_layout::MachineSpec;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

pub use self::process::Thread;
pub use self::regions::{Part, Region};
use self::rows::item;
use crate::boot_image::BootImage;
use crate::builder::build;
use crate::config::{ConsoleConfig, VmConfig};
use crate::error::Error;
use crate::machine::Machine;
use crate::sandbox;
use crate::signals::Signals;

/// CR0.PG and EFER.LMA (SDM 3A §2.5, §2.2.1).
const CR0_PG: u64 = 1 << 31;
const EFER_LMA: u64 = 1 << 10;

/// What there is to say of a machine.
#[derive(Debug)]
pub struct Explanation {
    /// All of it.
    pub text: String,
    /// The guest-physical address space.
    pub regions: Vec<Region>,
    /// The threads, in the order of their start.
    pub threads: Vec<Thread>,
}

/// Describes the machine that `config` asks for, without running it.
///
/// # Errors
/// Those of building it.
pub fn explain(config: &VmConfig) -> Result<Explanation, Error> {
    let signals = Signals::block()?;
    let machine = &build(&without_traces(config), None, signals)?.machine;
    let layout = &machine.hardware.layout;
    let mut lines = summary(&layout.spec);
    let image = machine.hardware.boot_image.as_ref();
    let regions = regions::regions(layout, image);
    for part in [Part::Map, Part::Registers, Part::Content] {
        lines.extend(regions::rows(&regions, part));
    }
    lines.extend(image.map(boot).unwrap_or_default());
    lines.extend(registers(machine)?);
    lines.extend(ports(config));
    machine.hardware.disks.iter().for_each(|disk| lines.extend(disks::describe(disk)));
    let threads = process::threads();
    lines.extend(process::thread_rows(&threads));
    lines.extend(process::descriptors());
    lines.extend(left_out(config));
    lines.push("System calls that a thread may make once the guest runs".to_owned());
    lines.extend(match sandbox::system_calls(config) {
        Some(kinds) => {
            kinds.into_iter().map(|(kind, calls)| item(kind, calls.join(", "))).collect()
        }
        None => vec!["  all: --sandbox off".to_owned()],
    });
    Ok(Explanation { text: lines.join("\n") + "\n", regions, threads })
}

/// The same machine, but it leaves nothing on the host: its consoles are standard streams, and it has no sockets.
fn without_traces(config: &VmConfig) -> VmConfig {
    let quiet = |console: &ConsoleConfig| match console {
        ConsoleConfig::None => ConsoleConfig::None,
        _ => ConsoleConfig::Stderr,
    };
    let consoles = config.consoles.each_ref().map(quiet);
    let mut disks = config.disks.clone();
    disks.iter_mut().for_each(|disk| disk.image.log_writes = None);
    let (qmp, gdb, dump_on_panic) = (None, None, None);
    VmConfig { consoles, disks, qmp, gdb, dump_on_panic, timeout: None, ..config.clone() }
}

/// The descriptors that only a run opens.
fn left_out(config: &VmConfig) -> impl Iterator<Item = String> {
    let consoles = config.consoles.iter().filter_map(|console| match console {
        ConsoleConfig::File { path, .. } => Some(format!("  {}: a run opens it", path.display())),
        ConsoleConfig::Unix(path) => Some(format!("  {}: a run binds it", path.display())),
        ConsoleConfig::Pty => Some("  /dev/pts: a run makes a pseudo-terminal".to_owned()),
        ConsoleConfig::Stdio | ConsoleConfig::Stderr | ConsoleConfig::None => None,
    });
    let logs = config.disks.iter().filter_map(|disk| disk.image.log_writes.as_ref());
    let files = logs
        .chain(config.dump_on_panic.as_ref())
        .map(|path| format!("  {}: a run opens it", path.display()));
    let control = config.qmp.iter().map(|path| format!("  {}: a run binds it", path.display()));
    let sockets = control.chain(config.gdb.iter().map(|gdb| format!("  {gdb}: a run binds it")));
    consoles.chain(files).chain(sockets)
}

fn summary(spec: &MachineSpec) -> Vec<String> {
    let tables = if spec.acpi { "ACPI" } else { "MPTable" };
    let (memory, cpus, disks) = (spec.memory >> 10, spec.cpus, spec.disks);
    vec![format!(
        "Machine: {memory} KiB of memory, vCPUs: {cpus}, disks: {disks}, tables: {tables}"
    )]
}

/// How the kernel is started.
fn boot(image: &BootImage) -> Vec<String> {
    let plan = &image.plan;
    let cmdline = plan.structures.iter().find(|structure| structure.address == layout::CMDLINE);
    let words = cmdline.map(|structure| structure.bytes.trim_ascii_end()).unwrap_or_default();
    let words = words.strip_suffix(b"\0").unwrap_or(words);
    let mut lines = vec!["Kernel command line".to_owned()];
    lines.push(format!("  {}", String::from_utf8_lossy(words)));
    let protocol = match plan.entry.protocol {
        Protocol::Pvh => "PVH: ebx points to the start info",
        Protocol::Linux64 => "Linux, 64-bit: rsi points to the zero page",
    };
    lines.push("Boot protocol".to_owned());
    lines.push(format!("  {protocol}"));
    lines
}

fn registers(machine: &Machine) -> Result<Vec<String>, Error> {
    let vcpus = &machine.hardware.vcpus;
    let mut lines = vec!["Registers of vCPU 0 at the entry; those not shown are 0".to_owned()];
    if let Some(first) = vcpus.first() {
        let (regs, sregs) = first.with_paused(|vcpu| {
            let failed = || Error::kvm("read a vCPU's registers");
            Ok((vcpu.fd.get_regs().map_err(failed())?, vcpu.fd.get_sregs().map_err(failed())?))
        })?;
        lines.extend(general(&regs));
        lines.extend(system(&sregs));
    }
    if vcpus.len() > 1 {
        lines.push("  The other vCPUs wait for INIT and SIPI.".to_owned());
    }
    Ok(lines)
}

fn general(regs: &kvm_regs) -> impl Iterator<Item = String> {
    [
        ("rip", regs.rip),
        ("rflags", regs.rflags),
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
    ]
    .into_iter()
    .filter(|(_, value)| *value != 0)
    .map(|(name, value)| item(name, format_args!("{value:#x}")))
}

fn system(sregs: &kvm_sregs) -> Vec<String> {
    let mode = match (sregs.efer & EFER_LMA != 0, sregs.cr0 & CR0_PG != 0) {
        (true, _) => "64-bit, paging",
        (false, true) => "32-bit, paging",
        (false, false) => "32-bit, no paging",
    };
    let mut lines = vec![item("cr0", format_args!("{:#x} ({mode})", sregs.cr0))];
    for (name, value) in [("cr3", sregs.cr3), ("cr4", sregs.cr4), ("efer", sregs.efer)] {
        lines.push(item(name, format_args!("{value:#x}")));
    }
    for (name, segment) in [("cs", &sregs.cs), ("ds, es, fs, gs, ss", &sregs.ds), ("tr", &sregs.tr)]
    {
        let kvm_segment { selector, base, limit, .. } = segment;
        lines.push(item(name, format_args!("{selector:#x}, base {base:#x}, limit {limit:#x}")));
    }
    for (name, table) in [("gdtr", &sregs.gdt), ("idtr", &sregs.idt)] {
        lines.push(item(name, format_args!("base {:#x}, limit {:#x}", table.base, table.limit)));
    }
    lines.push(item("apic_base", format_args!("{:#x}", sregs.apic_base)));
    lines
}

/// The I/O ports. Those of KVM's own interrupt controllers and timer are not minivmm's.
fn ports(config: &VmConfig) -> Vec<String> {
    let mut ports = vec![
        (layout::I8042_DATA, "i8042: resets the machine".to_owned()),
        (layout::PVPANIC, "pvpanic".to_owned()),
        (layout::SLEEP_CONTROL, "ACPI sleep control and status".to_owned()),
        (layout::RESET, "reset".to_owned()),
    ];
    for (name, (present, (port, gsi))) in
        ["ttyS0", "ttyS1"].iter().zip(config.serial.iter().zip(layout::SERIAL_PORTS))
    {
        if *present {
            ports.push((port, format!("{name}, interrupt {gsi}")));
        }
    }
    if config.debug_exit {
        ports.push((layout::DEBUG_EXIT, "debug exit".to_owned()));
    }
    ports.sort_unstable();
    let mut lines = vec!["I/O ports".to_owned()];
    lines.extend(ports.into_iter().map(|(port, what)| item(&format!("{port:#06x}"), what)));
    lines
}
