//! Command lines that are refused, each with one line that names the option and its value: exit status 2.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use devices::block::ErrorPolicy;
use vmm::WithCauses;

/// Options that are sound by themselves but do not go together.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    #[error("--vcpu-affinity names {named} CPUs; name one for each of the --cpus {cpus}")]
    AffinityCount { named: usize, cpus: u32 },
    #[error(
        "--disk {}: {key}={policy} stops the VM and only a control client can resume it; add --qmp unix:PATH", path.display()
    )]
    StopsForEver { path: PathBuf, key: &'static str, policy: ErrorPolicy },
    #[error("--disk {}: log-writes= does not see what SCSI commands write; leave out scsi=on", path.display())]
    LogsNoScsi { path: PathBuf },
    #[error("--disk {}: id={id} is the name of another disk; give each its own id=", path.display())]
    DuplicateId { path: PathBuf, id: String },
    #[error("--disk {}: throttling.group={group} has other limits than disk {id} of the same group; write the same for both", path.display())]
    GroupLimits { path: PathBuf, group: String, id: String },
    #[error("--console: given {0} times; a guest has two serial ports: give it once or twice")]
    Consoles(usize),
    #[error("--console stdio: given twice; write another place for one of them, such as file:PATH")]
    StdioTwice,
    #[error(
        "--console stdio: standard output is for the output of --exec; write stderr or file:PATH"
    )]
    ExecOutput,
    #[error("--console: given twice; --exec uses the second serial port: give it once")]
    ExecConsole,
    #[error("--exec: the command needs a disk with a root file system; add --disk PATH")]
    ExecDisk,
    #[error("--exec: with --debug-exit there are two exit statuses; leave out --debug-exit")]
    ExecDebugExit,
    #[error("--cmdline {0}: --exec says what init is and does; leave that word out")]
    ExecInit(String),
    #[error("--incoming defer: a control client names the file; add --qmp unix:PATH")]
    DeferWithoutControl,
    #[error("--paused: only a client can start the guest; add --qmp unix:PATH or --gdb unix:PATH")]
    PausedForEver,
    #[error("--user: the sandbox changes the user; leave out --sandbox off")]
    UserWithoutSandbox,
    #[error("--trace: {0}= given twice; there is one trace: give it once")]
    TraceTwice(&'static str),
    #[error("--trace: format=json and format=perfetto need a file of their own; add file=PATH")]
    TraceFile,
    #[error("{second} is the same file as {first}; give each its own file")]
    SameFile { first: String, second: String },
}

/// What users of QEMU and of other hypervisors try, without leading dashes, and what does it here.
const OPTION_HINTS: &[(&str, &str)] = &[
    ("api-sock", "--qmp unix:PATH"),
    ("S", "--paused"),
    ("append", "--cmdline WORDS"),
    ("blockdev", "--disk PATH"),
    ("cdrom", "--disk PATH,readonly=on"),
    ("chardev", "--console WHERE"),
    ("device", "--disk PATH, or --debug-exit for isa-debug-exit"),
    ("drive", "--disk PATH"),
    ("gdb", "--gdb unix:PATH"),
    ("hda", "--disk PATH"),
    ("hdb", "--disk PATH"),
    ("incoming", "--incoming file:PATH"),
    ("initrd", "--initrd FILE"),
    ("kernel", "--kernel FILE"),
    ("mem", "--memory SIZE"),
    ("monitor", "--qmp unix:PATH"),
    ("params", "--cmdline WORDS"),
    ("qmp", "--qmp unix:PATH"),
    ("ram", "--memory SIZE"),
    ("root", "--cmdline root=DEVICE"),
    ("s", "--gdb tcp:127.0.0.1:1234"),
    ("serial", "--console WHERE"),
    ("smp", "--cpus N"),
    ("snapshot", "--disk PATH,snapshot=on"),
    ("trace", "--trace PATTERN"),
    ("vcpus", "--cpus N"),
];

/// Options of QEMU for what is always so here, or never.
const NEEDLESS: &[(&str, &str)] = &[
    ("-M", "there is one kind of machine"),
    ("-accel", "KVM is always used"),
    ("-bios", "the kernel starts without firmware"),
    ("-cpu", "the guest's CPU is the host's"),
    ("-display", "the console is the terminal"),
    ("-enable-kvm", "KVM is always used"),
    ("-machine", "there is one kind of machine"),
    ("-net", "there is no network device"),
    ("-netdev", "there is no network device"),
    ("-nic", "there is no network device"),
    ("-no-reboot", "a reboot always ends the VM"),
    ("-nodefaults", "there are no other devices"),
    ("-nographic", "the console is the terminal"),
];

/// What another program would understand among `arguments`, where `error` may be about it, and what to do here.
fn foreign<'a>(error: &clap::Error, arguments: &'a [OsString]) -> Option<(&'a str, String)> {
    let texts = arguments.iter().filter_map(|argument| argument.to_str());
    texts.filter(|argument| may_be_about(error, argument)).find_map(|argument| {
        let option = argument.split('=').next()?;
        if let Some((_, why)) = NEEDLESS.iter().find(|(known, _)| *known == option) {
            return Some((option, format!("{why}; leave it out")));
        }
        let name = option.strip_prefix("--").or(option.strip_prefix('-'))?;
        let (_, hint) = OPTION_HINTS.iter().find(|(known, _)| *known == name)?;
        // `-kernel` is QEMU's, `--kernel` is not at fault.
        let is_known = hint.split(' ').next() == Some(option);
        (!is_known).then(|| (option, format!("unknown option; write {hint}")))
    })
}

/// Whether `error` may be about this argument. clap reads `-smp` as three options of one letter, and `-machine` as `-m achine`.
fn may_be_about(error: &clap::Error, argument: &str) -> bool {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    let letters = argument.strip_prefix('-').filter(|letters| !letters.starts_with('-'));
    match error.kind() {
        ErrorKind::UnknownArgument => {
            let unknown = context(ContextKind::InvalidArg);
            let letter = unknown.strip_prefix('-').filter(|letter| letter.chars().count() == 1);
            argument.split('=').next() == Some(unknown)
                || letters.zip(letter).is_some_and(|(letters, letter)| letters.contains(letter))
        }
        ErrorKind::ValueValidation => {
            let value = context(ContextKind::InvalidValue);
            letters.and_then(|letters| letters.strip_prefix('m')) == Some(value)
        }
        // `--memory` was given as well.
        ErrorKind::ArgumentConflict => letters.is_some_and(|letters| letters.starts_with('m')),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => letters.is_some(),
        _ => false,
    }
}

/// The line for an error that clap found in `arguments`. `None`: they ask for the help or the version.
pub(crate) fn describe(
    error: &clap::Error,
    arguments: &[OsString],
    program: &str,
) -> Option<String> {
    let help = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    // `-hda` begins with `-h`, for help.
    let asked = ["-h", "-V", "--help", "--version"];
    if help && arguments.iter().any(|argument| asked.iter().any(|option| argument == option)) {
        return None;
    }
    match foreign(error, arguments) {
        Some((option, hint)) => return Some(format!("{option}: {hint}")),
        None if help => return None,
        None => {}
    }
    Some(line(error, &format!("see `{program} --help`")))
}

/// What clap found, with its option and value first; `help` says how to get the help.
fn line(error: &clap::Error, help: &str) -> String {
    let texts = |kind| match error.get(kind) {
        Some(ContextValue::Strings(texts)) => texts.clone(),
        Some(ContextValue::String(text)) => vec![text.clone()],
        _ => Vec::new(),
    };
    let first = |kind| texts(kind).into_iter().next().unwrap_or_default();
    // Such as `--memory SIZE`, or `SIZE` for an argument without an option.
    let argument = first(ContextKind::InvalidArg).replace(['<', '>'], "");
    let option = name(&argument);
    let meant = |kind| match texts(kind) {
        known if known.is_empty() => help.to_owned(),
        known => format!("did you mean {}? ({help})", known.join(" or ")),
    };
    match (error.kind(), error.source()) {
        (ErrorKind::ValueValidation, Some(source)) => {
            let value = first(ContextKind::InvalidValue);
            let value: String = value.chars().take(200).collect();
            let value = if value.is_empty() { "''" } else { &value };
            format!("{option} {value}: {}", WithCauses(source))
        }
        (ErrorKind::InvalidValue, _) if first(ContextKind::InvalidValue).is_empty() => {
            format!("{option}: its value is missing; write {argument}")
        }
        (ErrorKind::TooManyValues, _) => {
            let value = first(ContextKind::InvalidValue);
            format!("{option}={value}: the option takes no value; write {option}")
        }
        (ErrorKind::UnknownArgument, _) if !option.starts_with('-') => {
            let option = if option.is_empty() { "''" } else { option };
            format!("{option}: unexpected argument; options begin with -- ({help})")
        }
        (ErrorKind::UnknownArgument, _) => {
            format!("{option}: unknown option; {}", meant(ContextKind::SuggestedArg))
        }
        (ErrorKind::ArgumentConflict, _) => {
            conflict(option, &first(ContextKind::PriorArg).replace(['<', '>'], ""))
        }
        (ErrorKind::MissingRequiredArgument, _) => {
            let missing = texts(ContextKind::InvalidArg);
            let verb = if missing.len() == 1 { "is" } else { "are" };
            format!("{} {verb} missing; {help}", missing.join(" and ").replace(['<', '>'], ""))
        }
        (ErrorKind::InvalidSubcommand, _) => {
            let command = first(ContextKind::InvalidSubcommand);
            format!("{command}: unknown command; {}", meant(ContextKind::SuggestedSubcommand))
        }
        (ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand, _) => {
            format!("the command is missing; {help}")
        }
        _ => {
            let text = error.to_string();
            let summary = text.split("\n\n").next().unwrap_or_default();
            let words: Vec<_> = summary.trim_start_matches("error: ").split_whitespace().collect();
            format!("{}; {help}", words.join(" "))
        }
    }
}

/// The option alone of `--memory SIZE` or `--explain[=text|svg]`.
fn name(argument: &str) -> &str {
    let word = argument.split(' ').next().unwrap_or_default();
    word.split("[=").next().unwrap_or_default()
}

/// `option` is given with one that it does not go with, or a second time.
fn conflict(option: &str, other: &str) -> String {
    match name(other) {
        other if other.is_empty() || other == option => {
            format!("{option}: given twice; give it once")
        }
        other => format!("{option}: cannot be given with {other}; leave out one of them"),
    }
}
