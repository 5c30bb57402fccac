//! QEMU's character devices, for its clients: the consoles of the serial ports, and the control socket.
//!
//! A capability: code that opens a character device calls [`add`], and QMP's `query-chardev` shows the devices.

use std::sync::Mutex;

use crate::config::ConsoleConfig;
use crate::lock;

/// Labels and file names as QEMU has them, in the order in which they were opened.
static ALL: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Records that the device with this label is at `filename` from now on.
pub(crate) fn add(label: &str, filename: String) {
    let mut all = lock(&ALL);
    all.retain(|(known, _)| known != label);
    all.push((label.to_owned(), filename));
}

/// The label and file name of each device.
pub(crate) fn all() -> Vec<(String, String)> {
    lock(&ALL).clone()
}

/// The file name of a console; `terminal` is that of its pseudo-terminal.
pub(crate) fn filename(console: &ConsoleConfig, terminal: Option<String>) -> String {
    match console {
        ConsoleConfig::Stdio => "stdio".to_owned(),
        ConsoleConfig::Stderr => "stderr".to_owned(),
        ConsoleConfig::File { .. } => "file".to_owned(),
        ConsoleConfig::Pty => format!("pty:{}", terminal.unwrap_or_default()),
        ConsoleConfig::Unix(path) => format!("unix:{},server=on", path.display()),
        ConsoleConfig::None => "null".to_owned(),
    }
}
