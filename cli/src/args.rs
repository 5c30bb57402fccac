//! The command line, turned into one validated [`VmConfig`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, ValueEnum};
use vmm::{BootTiming, ConsoleConfig, Moment, VmConfig};

use crate::disk_option::{self, DiskOption, Surroundings};
use crate::log::say;
use crate::processors::{self, Processors};
use crate::{EXIT_USAGE, size};

/// A minimal KVM hypervisor: boots a Linux kernel with a serial console and virtio-mmio disks.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 120, after_help = EXIT_HELP, after_long_help = long_help())]
struct Arguments {
    /// The kernel: an ELF vmlinux or a bzImage.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// The initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Words for the kernel command line; they follow the defaults and win over them.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true, value_parser = OsStringValueParser::new().try_map(words))]
    cmdline: Vec<String>,

    /// A disk, /dev/vda first: PATH[,key=value...]; the keys are listed below.
    #[arg(long = "disk", value_name = "PATH[,KEY=VALUE]...")]
    disks: Vec<DiskOption>,

    /// Guest memory: 512M, 2G, 65536K; a plain number counts MiB.
    #[arg(long, short, value_name = "SIZE", default_value = "512M", allow_hyphen_values = true, value_parser = size::memory)]
    memory: u64,

    /// Take guest memory from the host's pool of huge pages, all of it at the start.
    #[arg(long)]
    hugepages: bool,

    /// Number of virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 1, allow_hyphen_values = true, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,

    /// The host's processor for each virtual CPU, in order: 0,2-3.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true, value_parser = processors::list)]
    vcpu_affinity: Option<Processors>,

    /// The host's processors for the disks' threads: 0,2-3.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true, value_parser = processors::list)]
    io_affinity: Option<Processors>,

    /// Describe the machine by ACPI tables; `off` gives an MPTable and virtio_mmio.device= arguments.
    #[arg(long, value_name = "on|off", default_value = "on")]
    acpi: Switch,

    /// The serial console: stdio, file:PATH, pty, unix:PATH or none.
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = console)]
    console: ConsoleConfig,

    /// Listen for control clients that speak QMP: unix:PATH, a socket that only you can open.
    #[arg(long, value_name = "unix:PATH", value_parser = socket)]
    qmp: Option<PathBuf>,

    /// Wait for a control client's `cont` before the guest starts, as QEMU does with -S.
    #[arg(long, requires = "qmp")]
    paused: bool,

    /// End the VM after this long with exit status 124: 60s, 5m, 1h.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = size::duration)]
    timeout: Option<Duration>,

    /// Open I/O port 0xf4: a byte that the guest writes there becomes the exit status.
    #[arg(long)]
    debug_exit: bool,

    /// Let reads of the disks' registers exit to minivmm, instead of mapping the registers into the guest.
    #[arg(long)]
    trap_registers: bool,

    /// Say where the time goes until the guest is first entered, and until it first prints.
    #[arg(long)]
    boot_timing: bool,

    /// Log what minivmm does.
    #[arg(long, short)]
    verbose: bool,
}

const EXIT_HELP: &str = "`minivmm ctl SOCKET COMMAND` controls a VM with --qmp; see `minivmm ctl --help`.\n\
    On a terminal, Ctrl-A x quits and Ctrl-A h helps.\n\
    Exit status: 0 the guest powered off or rebooted, or we were told to end; 1 the host failed; 2 bad arguments; \
    3 the guest panicked; 124 --timeout passed; with --debug-exit, the guest's byte.";

fn long_help() -> String {
    format!("{}\n\n{EXIT_HELP}", disk_option::HELP)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// Parses our own command line; `started` is when `main` began. The flag says whether to log.
///
/// # Errors
/// The exit status, after saying in one line what is wrong (or printing the help that was asked for).
pub(crate) fn parse(started: Moment) -> Result<(VmConfig, bool), ExitCode> {
    let arguments = Arguments::try_parse().map_err(|error| report(&error))?;
    let verbose = arguments.verbose;
    let timing = if arguments.boot_timing { BootTiming::since(started, say) } else { BootTiming::off() };
    let config = arguments.into_config(timing).map_err(|reason| {
        say(&reason);
        ExitCode::from(EXIT_USAGE)
    })?;
    config.timing.over("arguments");
    Ok((config, verbose))
}

impl Arguments {
    /// The configuration, or what is wrong with the options together.
    fn into_config(self, timing: BootTiming) -> Result<VmConfig, String> {
        let machine = Surroundings { cpus: self.cpus, control: self.qmp.is_some() };
        let vcpu_affinity = self.vcpu_affinity.unwrap_or_default().0;
        if !vcpu_affinity.is_empty() && vcpu_affinity.len() != self.cpus as usize {
            let (named, cpus) = (vcpu_affinity.len(), self.cpus);
            return Err(format!("--vcpu-affinity names {named} processors; name one for each of the --cpus {cpus}"));
        }
        let disks = self.disks.into_iter().enumerate().map(|(index, disk)| disk.into_config(index, machine));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        for (index, disk) in disks.iter().enumerate() {
            if disks[..index].iter().any(|other| other.id == disk.id) {
                let (path, id) = (disk.image.path.display(), &disk.id);
                return Err(format!("--disk {path}: id={id} is another disk's; give each its own id="));
            }
        }
        Ok(VmConfig {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline.join(" "),
            memory: self.memory,
            hugepages: self.hugepages,
            cpus: self.cpus,
            vcpu_affinity,
            io_affinity: self.io_affinity.unwrap_or_default().0,
            acpi: self.acpi == Switch::On,
            disks,
            qmp: self.qmp,
            paused: self.paused,
            console: self.console,
            timeout: self.timeout,
            debug_exit: self.debug_exit,
            trap_registers: self.trap_registers,
            timing,
        })
    }
}

/// Which of the characters a kernel can take is for the boot protocol to say; these words are not even text.
fn words(words: OsString) -> Result<String, &'static str> {
    words.into_string().map_err(|_| "not UTF-8; only printable ASCII characters can be passed")
}

fn console(text: &str) -> Result<ConsoleConfig, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(ConsoleConfig::Stdio),
        None if text == "pty" => Ok(ConsoleConfig::Pty),
        None if text == "none" => Ok(ConsoleConfig::None),
        Some(("file", path)) if !path.is_empty() => Ok(ConsoleConfig::File(path.into())),
        Some(("unix", path)) if !path.is_empty() => Ok(ConsoleConfig::Unix(path.into())),
        _ => Err("write stdio, file:PATH, pty, unix:PATH or none".to_owned()),
    }
}

fn socket(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("write unix:PATH".to_owned()),
    }
}

/// Help and version go out as clap renders them; an error becomes one line with clap's suggestion.
fn report(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // Fails only when nobody reads our output.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    say(&one_line(error));
    ExitCode::from(EXIT_USAGE)
}

fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let summary: Vec<_> = text
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .lines()
        .map(|line| line.trim().trim_start_matches("error: "))
        .collect();
    let suggestion = [ContextKind::SuggestedArg, ContextKind::SuggestedValue]
        .into_iter()
        .find_map(|kind| error.get(kind))
        .map(|value| match value {
            ContextValue::Strings(values) => values.join("' or '"),
            other => other.to_string(),
        })
        .map(|value| format!("; did you mean '{value}'?"))
        .unwrap_or_default();
    format!("{}{suggestion} (see minivmm --help)", summary.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(arguments: &[&str]) -> Result<VmConfig, String> {
        Arguments::try_parse_from([&["minivmm"], arguments].concat())
            .map_err(|error| one_line(&error))
            .and_then(|arguments| arguments.into_config(BootTiming::off()))
    }

    #[test]
    fn the_declaration_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let config = parse(&["--kernel", "vmlinux", "--disk", "root.img"]).unwrap();
        assert_eq!(config.memory, 512 << 20);
        assert_eq!((config.cpus, config.acpi, config.debug_exit), (1, true, false));
        assert_eq!(config.console, ConsoleConfig::Stdio);
        assert_eq!(config.disks.len(), 1);
    }

    #[test]
    fn cmdline_words_may_look_like_options() {
        let config = parse(&["--kernel", "k", "--cmdline", "-- -x", "--cmdline", "quiet"]).unwrap();
        assert_eq!(config.cmdline, "-- -x quiet");
    }

    #[test]
    fn consoles() {
        assert_eq!(console("file:/a:b"), Ok(ConsoleConfig::File("/a:b".into())));
        assert_eq!(console("unix:s"), Ok(ConsoleConfig::Unix("s".into())));
        for bad in ["", "tty", "file:", "unix", "stdio:"] {
            assert!(console(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_may_stop_the_vm_only_where_someone_can_resume_it() {
        use devices::block::ErrorPolicy;
        let policies = |arguments: &[&str]| {
            let config = parse(&[&["--kernel", "k"], arguments].concat())?;
            Ok::<_, String>((config.disks[0].device.read_errors, config.disks[0].device.write_errors))
        };
        assert_eq!(policies(&["--disk", "a"]), Ok((ErrorPolicy::Report, ErrorPolicy::Report)));
        assert_eq!(policies(&["--disk", "a", "--qmp", "unix:s"]), Ok((ErrorPolicy::Report, ErrorPolicy::Enospc)));
        let both = ["--disk", "a,rerror=stop,werror=ignore", "--qmp", "unix:s"];
        assert_eq!(policies(&both), Ok((ErrorPolicy::Stop, ErrorPolicy::Ignore)));
        for option in ["rerror=stop", "werror=enospc"] {
            let error = policies(&["--disk", &format!("a,{option}")]).unwrap_err();
            assert!(error.contains(option) && error.contains("--qmp"), "{error}");
        }
        for bad in ["rerror=enospc", "werror=halt"] {
            let error = policies(&["--disk", &format!("a,{bad}"), "--qmp", "unix:s"]).unwrap_err();
            assert!(error.contains(bad), "{error}");
        }
        assert!(parse(&["--kernel", "k", "--qmp", "/s"]).unwrap_err().contains("unix:PATH"));
    }

    #[test]
    fn errors_are_one_line_with_a_suggestion() {
        let line = parse(&["--kernal", "k"]).unwrap_err();
        assert!(line.contains("--kernal") && line.contains("did you mean '--kernel'"), "{line}");
        for arguments in [&["--cpus", "0"][..], &["--memory", "12Q"], &["--acpi", "of"], &[]] {
            let line = parse(arguments).unwrap_err();
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
