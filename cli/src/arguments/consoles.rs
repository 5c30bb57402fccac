//! The serial ports of a machine, from `--console` and `--exec`: what each is for, and what does not go together.

use vmm::ConsoleConfig;

use super::usage_error::UsageError;

/// Where the serial ports are, as `--console` was given.
pub(super) fn choose(
    given: Vec<ConsoleConfig>,
    exec: bool,
) -> Result<[ConsoleConfig; 2], UsageError> {
    let count = given.len();
    let mut given = given.into_iter();
    let first = given.next();
    if exec && first == Some(ConsoleConfig::Stdio) {
        return Err(UsageError::ExecOutput);
    }
    let default = if exec { ConsoleConfig::Stderr } else { ConsoleConfig::Stdio };
    let consoles = [first.unwrap_or(default), given.next().unwrap_or(ConsoleConfig::None)];
    match count {
        2 if exec => Err(UsageError::ExecConsole),
        2 if consoles.iter().all(|console| *console == ConsoleConfig::Stdio) => {
            Err(UsageError::StdioTwice)
        }
        ..=2 => Ok(consoles),
        _ => Err(UsageError::Consoles(count)),
    }
}

/// What does not go together with `--exec`.
pub(super) fn check_exec(
    cmdline: &[String],
    no_disk: bool,
    debug_exit: bool,
) -> Result<(), UsageError> {
    let words = cmdline.iter().flat_map(|words| words.split(' '));
    let is_for_init = |word: &&str| *word == "--" || word.starts_with("init=");
    match words.clone().find(is_for_init) {
        Some(word) => Err(UsageError::ExecInit(word.to_owned())),
        None if no_disk => Err(UsageError::ExecDisk),
        None if debug_exit => Err(UsageError::ExecDebugExit),
        None => Ok(()),
    }
}
