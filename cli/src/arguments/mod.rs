//! The command line, turned into one validated [`VmConfig`].
//!
//! clap splits it into options and calls the parsers of [`value`] and [`disk`]. [`Arguments::into_config`] checks what options mean
//! together, and [`same_file`] that no file is named for two purposes. Nothing is opened here. Every refusal is one line, printed by
//! [`parse`], and exit status 2.

mod consoles;
pub(crate) mod disk;
#[cfg(test)]
mod fuzz;
pub(crate) mod incoming;
mod same_file;
mod throttling;
mod trace;
pub(crate) mod usage_error;
pub(crate) mod value;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vmm::{ConsoleConfig, DiskConfig, GdbConfig, SandboxMode, VmConfig};

use self::disk::{Context, DiskOption};
use self::incoming::IncomingOption;
use self::usage_error::UsageError;
pub(crate) use self::value::ExplainFormat;
use self::value::{os_text, text};
use crate::exit_codes::{EXIT_HOST, EXIT_USAGE};
use crate::messages::{print_message, was_taken};
use crate::trace::TraceOptions;

/// A minimal KVM hypervisor: boots a Linux kernel with a serial console and virtio-mmio disks.
#[derive(Debug, Parser)]
#[command(name = "minivmm", version = concat!(env!("CARGO_PKG_VERSION"), env!("MINIVMM_COMMIT")), max_term_width = 120, after_help = EXIT_HELP, after_long_help = long_help())]
struct Arguments {
    #[command(flatten)]
    guest: GuestOptions,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    control: ControlOptions,
    #[command(flatten)]
    process: ProcessOptions,
}

// In groups, since clap's code for a group holds all its options on the stack at once. Comments that rustdoc reads would become
// the program's description.

// What boots: the kernel and its disks.
#[derive(Debug, clap::Args)]
struct GuestOptions {
    /// The kernel: an ELF vmlinux or a bzImage (vmlinuz).
    ///
    /// A vmlinux is entered through its PVH note, or by the 64-bit Linux boot protocol if it has none.
    #[arg(long, value_name = "FILE", required_unless_present = "incoming")]
    kernel: Option<PathBuf>,

    /// The initial RAM disk.
    ///
    /// A cpio archive, compressed or not, that the kernel unpacks into its first root file system.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// Appended to the default kernel command line; later words override earlier ones. May be repeated.
    ///
    /// If a word here has the same key as a default word, such as root= or console=, the default word is left out. --verbose prints the
    /// whole command line.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true, value_parser = text(|words| Ok(words.to_owned())))]
    cmdline: Vec<String>,

    #[allow(rustdoc::broken_intra_doc_links, reason = "brackets are what the help prints")]
    /// Start a saved machine: file:PATH[,map=auto|on|off][,clock=stopped|host][,disks=checked|unchecked][,paths=given|saved].
    ///
    /// The guest's machine comes from the file. Give the image of each disk again, by --disk with the id= of the saved disk. Give --kernel
    /// if the guest is to be reset later. If you trust the author of the file, paths=saved opens the images and the kernel that it names
    /// instead. map=on maps memory from the file, and keeps other programs from changing the file; map=off copies memory. With clock=host
    /// the guest's time goes on to the host's; otherwise it goes on from the save. disks=unchecked accepts images that were changed after
    /// the save. With defer[,KEY=VALUE]... a control client names the file by migrate-incoming.
    #[arg(long, value_name = "file:PATH[,KEY=VALUE]...", value_parser = os_text(incoming::parse),
          conflicts_with_all = ["cmdline", "memory", "hugepages", "cpus", "acpi", "debug_exit", "exec"])]
    incoming: Option<IncomingOption>,

    /// A disk, /dev/vda first: PATH[,key=value...]; the keys are listed below. May be repeated.
    ///
    /// If PATH is a directory, the guest gets a copy of it as an ext4 image. The copy is read-only; with snapshot=on the guest may change
    /// it, and the changes are lost at the end.
    #[arg(long = "disk", value_name = "PATH[,KEY=VALUE]...", value_parser = os_text(DiskOption::parse))]
    disks: Vec<DiskOption>,
}

// What it boots on.
#[derive(Debug, clap::Args)]
struct MachineOptions {
    /// Guest memory: 512M, 1.5G, 65536K; a plain number counts MiB.
    #[arg(long, short, value_name = "SIZE", default_value = "512M", allow_hyphen_values = true, value_parser = text(value::memory))]
    memory: u64,

    /// Take guest memory from the host's pool of 2 MiB pages, all of it at the start.
    ///
    /// The guest then causes no page faults on the host, and the host cannot run out of memory for it later.
    #[arg(long)]
    hugepages: bool,

    /// Number of virtual CPUs, 1 to 255.
    #[arg(long, value_name = "N", default_value = "1", allow_hyphen_values = true, value_parser = text(value::cpus))]
    cpus: u32,

    /// The host's CPU for each virtual CPU, in order: 0,2-3.
    ///
    /// Name as many CPUs as --cpus says. Without this option the host's scheduler chooses.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true, value_parser = text(cpu_list))]
    vcpu_affinity: Option<CpuList>,

    /// The host's CPUs for the threads that serve the disks: 0,2-3.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true, value_parser = text(cpu_list))]
    io_affinity: Option<CpuList>,

    /// Whether an idle virtual CPU stays in the guest: cpu-pm=on|off.
    ///
    /// The host's CPU is then busy all the time, and the guest wakes up without the host's help. For virtual CPUs that have CPUs to
    /// themselves; with --vcpu-affinity the guest is told so, and spins where it would sleep.
    #[arg(long, value_name = "cpu-pm=on|off", default_value = "cpu-pm=off", value_parser = text(value::overcommit), action = clap::ArgAction::Set)]
    overcommit: bool,

    /// Describe the machine by ACPI tables; `off` gives an MPTable and virtio_mmio.device= words instead.
    ///
    /// `off` is for kernels without ACPI. The guest then cannot power off by itself.
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = text(value::switch), action = clap::ArgAction::Set)]
    acpi: bool,

    /// Let the guest run guests of its own, if the host's KVM can (VMX or SVM).
    #[arg(long, value_name = "on|off", default_value = "off", value_parser = text(value::switch), action = clap::ArgAction::Set)]
    nested: bool,
}

// Who talks to it, and when it ends.
#[derive(Debug, clap::Args)]
struct ControlOptions {
    /// The serial console: stdio, stderr, file:PATH[,max=SIZE], pty, unix:PATH or none; a second one is the guest's ttyS1.
    ///
    /// With pty, the name of the pseudo-terminal is printed. A socket takes one client at a time. With none the guest has no serial port.
    /// The default is stdio, or stderr with --exec.
    #[arg(long = "console", value_name = "WHERE", value_parser = os_text(value::console))]
    consoles: Vec<ConsoleConfig>,

    /// Run a shell command in the guest instead of its init: its output and its exit status become those of minivmm.
    ///
    /// /bin/sh on the root disk runs the command, with empty input. Standard error and the kernel's log go to the console.
    #[arg(long, value_name = "COMMAND", allow_hyphen_values = true)]
    exec: Option<OsString>,

    /// Listen for control clients that speak QMP: unix:PATH, a socket that only this user can open.
    ///
    /// `minivmm ctl` is a client for the shell.
    #[arg(long, value_name = "unix:PATH", value_parser = os_text(value::socket))]
    qmp: Option<PathBuf>,

    /// Listen for a debugger that speaks GDB's remote protocol: unix:PATH or tcp:127.0.0.1:PORT.
    ///
    /// gdb connects by `target remote`, and the guest stops. Any user of the host can connect to a TCP port, and a debugger controls the
    /// whole guest.
    #[arg(long, value_name = "WHERE", value_parser = os_text(value::gdb))]
    gdb: Option<GdbConfig>,

    /// Start the guest when a control client sends `cont` or a debugger `continue`, as QEMU does with -S.
    #[arg(long)]
    paused: bool,

    /// End the VM after this time with exit status 124: 60s, 1m30s, 1h.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = text(value::duration))]
    timeout: Option<Duration>,

    /// How long a stop, a save, a reset or the end waits for a disk whose host does not answer.
    #[arg(long, value_name = "TIME", default_value = "30s", allow_hyphen_values = true, value_parser = text(value::duration))]
    stop_timeout: Duration,

    /// Open I/O port 0xf4: a byte that the guest writes there becomes the exit status.
    ///
    /// If the guest powers off or reboots without writing a byte, the exit status is 4.
    #[arg(long)]
    debug_exit: bool,
}

// What this process does besides.
#[derive(Debug, clap::Args)]
struct ProcessOptions {
    /// Let the guest's reads of disk registers exit to minivmm, instead of mapping the registers into the guest.
    ///
    /// For measurements: it shows what the mapping saves. The guest notices no difference.
    #[arg(long)]
    trap_registers: bool,

    /// Print how long each boot phase takes, until the guest first prints.
    ///
    /// For each phase: the time on the wall clock, and the CPU time of this process.
    #[arg(long)]
    boot_timing: bool,

    /// The directory that QMP's migrate to file:PATH may save the VM to while it is confined (see --sandbox).
    ///
    /// `minivmm ctl SOCKET save` does not need this: it opens the file itself, and passes the descriptor to the VM.
    #[arg(long, value_name = "DIR")]
    save_directory: Option<PathBuf>,

    /// When the guest panics or triple faults, write its memory and registers to this file, an ELF core.
    ///
    /// gdb and crash open it. The file is created empty at the start. If it has a dump already, only a new dump replaces that. A file with
    /// other content is refused.
    #[arg(long, value_name = "FILE")]
    dump_on_panic: Option<PathBuf>,

    /// Before the guest runs, give up all rights that minivmm does not need to run it: on, off or log.
    ///
    /// Each thread keeps only the system calls that it needs, and cannot open a file. A forbidden system call ends the VM; with log the
    /// host's kernel logs and allows it. If the host does not support a part of this, a warning says so. With ,spawn=allow one thread may
    /// start a child process, which a background save needs.
    #[arg(long, value_name = "on|off|log[,spawn=allow]", default_value = "on", value_parser = text(value::sandbox))]
    sandbox: (SandboxMode, bool),

    /// Become this user and group before the guest runs: UID:GID.
    ///
    /// Only root can use this. Files, sockets and /dev/kvm are opened before that, as root. The sockets are removed at the end if the user
    /// may write to their directories.
    #[arg(long, value_name = "UID:GID", value_parser = text(value::user))]
    user: Option<(u32, u32)>,

    /// Print the machine that the other options describe, and do not run it: as text, or with =svg as a picture of memory and threads.
    ///
    /// It prints the memory map, tables, registers at the kernel's entry, command line, disks, threads, descriptors, and the system calls
    /// that each thread may make. It builds the machine for that, but binds no socket, and creates no file of a console.
    #[arg(long, value_name = "text|svg", num_args = 0..=1, require_equals = true, default_missing_value = "text", value_parser = text(value::explain), conflicts_with = "incoming")]
    explain: Option<ExplainFormat>,

    #[allow(rustdoc::broken_intra_doc_links, reason = "brackets are what the help prints")]
    /// Record trace events: [enable=]PATTERN[,...][,file=PATH][,format=text|json|perfetto]. May be repeated.
    ///
    /// Events that QEMU has, too, have its names; `minivmm --trace help` lists all. A pattern may have * and ?. A - in front of a pattern
    /// turns its events off. Without file= the text goes to standard error. ui.perfetto.dev opens a file of format=perfetto. A control client
    /// turns events on and off by trace-event-set-state.
    #[arg(long = "trace", value_name = "PATTERN[,KEY=VALUE]...", allow_hyphen_values = true, value_parser = os_text(trace::parse))]
    traces: Vec<TraceOptions>,

    /// Log what minivmm does, such as the kernel command line that it uses.
    ///
    /// Warnings and errors are printed without this option, too.
    #[arg(long, short)]
    verbose: bool,
}

/// clap would take a plain `Vec` for an option that may be repeated.
type CpuList = std::sync::Arc<[usize]>;

fn cpu_list(text: &str) -> Result<CpuList, value::ValueError> {
    value::cpu_list(text).map(CpuList::from)
}

const EXIT_HELP: &str = "`minivmm ctl SOCKET COMMAND` controls a VM with --qmp; see `minivmm ctl --help`.\n\
    On a terminal, Ctrl-A x quits and Ctrl-A h prints the other keys.\n\
    Exit status: 0 the guest powered off or rebooted, or a user ended the VM; 1 the host failed; 2 bad arguments; \
    3 the guest panicked; 124 --timeout passed; with --debug-exit or --exec, the guest's byte or the command's status, \
    or 4 if the VM ended without one.";

fn long_help() -> String {
    format!("{}\n\n{EXIT_HELP}", disk::HELP)
}

/// What the command line asks for.
pub(crate) struct Parsed {
    /// With `incoming`, the saved machine decides about what the guest sees of it.
    pub(crate) config: VmConfig,
    pub(crate) incoming: Option<IncomingOption>,
    pub(crate) verbose: bool,
    pub(crate) boot_timing: bool,
    /// Print the machine and do not run it.
    pub(crate) explain: Option<ExplainFormat>,
    pub(crate) trace: Option<TraceOptions>,
}

/// The command line's definition, for man pages and completions.
#[allow(dead_code, reason = "an example makes the files that are installed")]
pub(crate) fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// Parses the process's command line.
///
/// # Errors
/// The exit status, after printing what is wrong, or the help that was asked for.
pub(crate) fn parse() -> Result<Parsed, ExitCode> {
    let arguments = parse_as::<Arguments>("minivmm", std::env::args_os().skip(1).collect())?;
    let ProcessOptions { verbose, boot_timing, explain, .. } = arguments.process;
    let incoming = arguments.guest.incoming.clone();
    let configured = trace::merge(arguments.process.traces.clone())
        .and_then(|trace| Ok((arguments.into_config(trace.as_ref())?, trace)));
    let (config, trace) = configured.map_err(|error| {
        print_message(&error.to_string());
        ExitCode::from(EXIT_USAGE)
    })?;
    Ok(Parsed { config, incoming, verbose, boot_timing, explain, trace })
}

/// Parses `arguments`, those behind the words `program`.
///
/// # Errors
/// The exit status, after printing what is wrong, or the help that was asked for.
pub(crate) fn parse_as<T: Parser>(program: &str, arguments: Vec<OsString>) -> Result<T, ExitCode> {
    let with_program = std::iter::once(program.into()).chain(arguments.iter().cloned());
    T::try_parse_from(with_program).map_err(|error| {
        match usage_error::describe(&error, &arguments, program) {
            Some(line) => {
                print_message(&line);
                ExitCode::from(EXIT_USAGE)
            }
            None if was_taken(error.print()) => ExitCode::SUCCESS,
            None => ExitCode::from(EXIT_HOST),
        }
    })
}

impl Arguments {
    /// The configuration.
    ///
    /// # Errors
    /// Options contradict each other.
    fn into_config(self, trace: Option<&TraceOptions>) -> Result<VmConfig, UsageError> {
        let Self { guest, machine, control, process } = self;
        let context = Context { cpus: machine.cpus, control: control.qmp.is_some() };
        let vcpu_affinity = machine.vcpu_affinity.unwrap_or_default();
        if matches!(guest.incoming, Some(IncomingOption::Defer(_))) && control.qmp.is_none() {
            return Err(UsageError::DeferWithoutControl);
        }
        if control.paused && control.qmp.is_none() && control.gdb.is_none() {
            return Err(UsageError::PausedForEver);
        }
        let (named, cpus) = (vcpu_affinity.len(), machine.cpus);
        if guest.incoming.is_none() && named != 0 && named != cpus as usize {
            return Err(UsageError::AffinityCount { named, cpus });
        }
        let disks = guest.disks.into_iter().enumerate();
        let disks = disks.map(|(index, disk)| disk.into_config(index, context));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        check_disks(&disks)?;
        let consoles = consoles::choose(control.consoles, control.exec.is_some())?;
        if control.exec.is_some() {
            consoles::check_exec(&guest.cmdline, disks.is_empty(), control.debug_exit)?;
        }
        if process.user.is_some() && process.sandbox.0 == SandboxMode::Off {
            return Err(UsageError::UserWithoutSandbox);
        }
        let has_second = consoles[1] != ConsoleConfig::None || control.exec.is_some();
        let config = VmConfig {
            kernel: guest.kernel.unwrap_or_default(),
            initrd: guest.initrd,
            cmdline: guest.cmdline.join(" "),
            memory: machine.memory,
            hugepages: machine.hugepages,
            cpus: machine.cpus,
            vcpu_affinity: vcpu_affinity.to_vec(),
            io_affinity: machine.io_affinity.unwrap_or_default().to_vec(),
            cpu_pm: machine.overcommit,
            acpi: machine.acpi,
            nested: machine.nested,
            disks,
            qmp: control.qmp,
            gdb: control.gdb,
            paused: control.paused,
            serial: [consoles[0] != ConsoleConfig::None, has_second],
            consoles,
            exec: control.exec,
            timeout: control.timeout,
            debug_exit: control.debug_exit,
            trap_registers: process.trap_registers,
            stop_timeout: control.stop_timeout,
            save_directory: process.save_directory,
            dump_on_panic: process.dump_on_panic,
            sandbox: process.sandbox.0,
            spawn: process.sandbox.1,
            user: process.user,
        };
        same_file::check(&config, guest.incoming.as_ref(), trace)?;
        Ok(config)
    }
}

fn check_disks(disks: &[DiskConfig]) -> Result<(), UsageError> {
    for (index, disk) in disks.iter().enumerate() {
        if disks[..index].iter().any(|other| other.id == disk.id) {
            let (path, id) = (disk.image.path.clone(), disk.id.clone());
            return Err(UsageError::DuplicateId { path, id });
        }
    }
    throttling::check_groups(disks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use devices::block::ErrorPolicy;

    fn parse(arguments: &[&str]) -> VmConfig {
        let arguments = [&["minivmm", "--kernel", "k"], arguments].concat();
        Arguments::try_parse_from(arguments).unwrap().into_config(None).unwrap()
    }

    #[test]
    fn the_declaration_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let config = parse(&["--disk", "root.img"]);
        assert_eq!(config.memory, 512 << 20);
        assert_eq!((config.cpus, config.acpi, config.debug_exit), (1, true, false));
        assert_eq!(config.consoles, [ConsoleConfig::Stdio, ConsoleConfig::None]);
        assert_eq!(config.disks.len(), 1);
    }

    #[test]
    fn cmdline_words_may_look_like_options() {
        assert_eq!(parse(&["--cmdline", "-- -x", "--cmdline", "quiet"]).cmdline, "-- -x quiet");
    }

    #[test]
    fn a_command_takes_the_standard_output() {
        let exec = ["--disk", "root.img", "--exec", "-x"];
        let config = parse(&exec);
        assert_eq!(config.exec.as_deref(), Some("-x".as_ref()));
        assert_eq!(config.consoles, [ConsoleConfig::Stderr, ConsoleConfig::None]);
        let config = parse(&[&exec[..], &["--console", "none"]].concat());
        assert_eq!(config.consoles, [ConsoleConfig::None, ConsoleConfig::None]);
    }

    #[test]
    fn the_second_console_is_the_second_serial_port() {
        let config = parse(&["--console", "none", "--console", "stdio"]);
        assert_eq!(config.consoles, [ConsoleConfig::None, ConsoleConfig::Stdio]);
    }

    #[test]
    fn error_policies_depend_on_a_control_client() {
        let policies = |arguments: &[&str]| {
            let device = parse(arguments).disks.remove(0).device;
            (device.read_errors, device.write_errors)
        };
        assert_eq!(policies(&["--disk", "a"]), (ErrorPolicy::Report, ErrorPolicy::Report));
        assert_eq!(
            policies(&["--disk", "a", "--qmp", "unix:s"]),
            (ErrorPolicy::Report, ErrorPolicy::Enospc)
        );
        let both = ["--disk", "a,rerror=stop,werror=ignore", "--qmp", "unix:s"];
        assert_eq!(policies(&both), (ErrorPolicy::Stop, ErrorPolicy::Ignore));
    }
}
