//! The exit statuses of minivmm and of `minivmm ctl`.

/// The guest powered off or rebooted, or a user ended the VM: `Ctrl-A x`, SIGTERM, SIGINT, `quit`.
pub(crate) const EXIT_CLEAN: u8 = 0;
pub(crate) const EXIT_HOST: u8 = 1;
/// The arguments are at fault; nothing was created or changed.
pub(crate) const EXIT_USAGE: u8 = 2;
pub(crate) const EXIT_GUEST_PANIC: u8 = 3;
/// With `--debug-exit` or `--exec`: the VM ended without the guest's byte or the command's status.
pub(crate) const EXIT_NO_STATUS: u8 = 4;
/// `--timeout` passed: the status of timeout(1).
pub(crate) const EXIT_TIMEOUT: u8 = 124;
