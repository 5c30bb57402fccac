//! `--exec COMMAND`: the guest's shell runs a command as process 1, and the command's output and status are minivmm's own.
//!
//! A capability: the builder calls [`plan`], which adds to the configuration what the guest needs, and [`attach()`], which plugs in the
//! second serial port. The parts:
//!
//! - `job.sh`, the script that the guest's `/bin/sh` runs (`init=/bin/sh -- /dev/vdX`). It is on a small read-only disk after the user's
//!   disks, because a kernel command line has only 2047 printable bytes.
//! - `frames`, which finds the output and the status in what the guest writes to the second serial port.
//! - `port`, the serial port, which makes the guest wait if the reader of the output is slow.
//! - `output`, which writes the output to minivmm's standard output, and then passes the status to the machine.
//!
//! A status is an event of the machine, like a byte at the debug-exit port. `cli` reports any other end as an error, so an exit status of
//! 0 is always the command's.

mod frames;
#[cfg(test)]
mod fuzz;
mod output;
mod port;

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex};

use arch::layout::SERIAL_PORTS;
use devices::block::BlockOptions;
use devices::bus::Bus;
use devices::disk::{Format, OpenOptions};
use devices::legacy::SerialDevice;
use devices::spawn::Spawn;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::rand::{GetRandomFlags, getrandom};

use self::output::{Buffer, JobOutput};
use self::port::{JobPort, PendingLine};
use crate::attach;
use crate::config::{DiskConfig, VmConfig};
use crate::error::Error;
use crate::events::EventSender;
use crate::sources::Source;

/// The script of the guest's shell. The definitions of `command` and `mark` are put before it.
const SCRIPT: &[u8] = include_bytes!("job.sh");
/// The script is padded to a multiple of this, because a disk consists of whole sectors.
const SECTOR: usize = 512;

/// Returns the configuration and the job. If `config` has a command, the configuration is extended by what the job needs.
///
/// # Errors
/// When the host has no memory or no random numbers.
pub(crate) fn plan(config: &VmConfig) -> Result<(Cow<'_, VmConfig>, Option<Job>), Error> {
    let Some(command) = &config.exec else { return Ok((Cow::Borrowed(config), None)) };
    let job = Job::new(command).map_err(Error::host("write the script for --exec"))?;
    Ok((Cow::Owned(job.extend(config)), Some(job)))
}

/// Puts the second serial port on the bus, whose output goes to minivmm's standard output. Without a job, does nothing.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn attach(
    job: &Option<Job>,
    vm: &Arc<VmFd>,
    port_io: &mut Bus,
    events: &Arc<EventSender>,
    spawn: &Spawn,
) -> Result<Option<Box<dyn Source>>, Error> {
    let Some(job) = job else { return Ok(None) };
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    let stdout = stdout.map_err(Error::host("duplicate standard output"))?;
    let buffer = Buffer::new(&job.mark);
    let (base, gsi) = SERIAL_PORTS[1];
    let line = PendingLine::new(attach::line(vm, gsi));
    // No input comes for the guest: nothing has to know when it takes some.
    let drained = attach::new_eventfd()?;
    let serial = SerialDevice::new(Arc::clone(&line) as _, Box::new(buffer.writer()), drained);
    let port = Arc::new(Mutex::new(JobPort { serial, line, buffer: Arc::clone(&buffer) }));
    port_io.insert(base.into(), SerialDevice::SIZE, port)?;
    let output = JobOutput::spawn(buffer, stdout, Arc::clone(events), spawn);
    let output = output.map_err(Error::host("start the thread of the command's output"))?;
    Ok(Some(Box::new(output)))
}

/// A command for the guest to run.
pub(crate) struct Job {
    mark: String,
    /// The script's file, in memory. The disk opens it again by its name in /proc.
    script: File,
}

impl Job {
    /// Writes the script.
    fn new(command: &OsStr) -> io::Result<Self> {
        let mut random = [0; 16];
        getrandom(&mut random, GetRandomFlags::empty())?;
        // The control character is rare in output: what may be a frame is held back until the next byte.
        let mark = format!("\x01{:032x} ", u128::from_le_bytes(random));
        let quoted = command.as_bytes().split(|byte| *byte == b'\'').collect::<Vec<_>>();
        let mut text = format!("mark='{mark}'\ncommand='").into_bytes();
        text.extend(quoted.join(&br"'\''"[..]));
        text.extend(b"'\n");
        text.extend(SCRIPT);
        text.resize(text.len().next_multiple_of(SECTOR), b'\n');
        let mut script = File::from(memfd_create("exec", MemfdFlags::CLOEXEC)?);
        script.write_all(&text)?;
        Ok(Self { mark, script })
    }

    /// Adds the script's disk, and words that name it.
    fn extend(&self, config: &VmConfig) -> VmConfig {
        let mut config = config.clone();
        let name = DiskConfig::linux_name(config.disks.len());
        let fd = self.script.as_raw_fd();
        let mut image = OpenOptions::new(format!("/proc/self/fd/{fd}"));
        image.format = Some(Format::Raw);
        image.read_only = true;
        // The kernel mounts /dev by itself. Alpine's initrd takes the arguments of init from `init_args=`, others as Linux does.
        let args = if config.initrd.is_some() {
            Cow::from(format!(" init_args=/dev/{name}"))
        } else {
            "".into()
        };
        config.cmdline =
            format!("init=/bin/sh devtmpfs.mount=1{args} {} -- /dev/{name}", config.cmdline);
        config.disks.push(DiskConfig {
            id: "exec".to_owned(),
            image,
            device: BlockOptions::new(name),
        });
        config
    }
}
