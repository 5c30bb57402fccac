//! `--exec COMMAND`: the guest's shell runs a command as process 1, and the command's output and status are minivmm's own.
//!
//! A capability: the builder lets [`plan`] add to the configuration what the guest needs, and [`attach()`] plug the
//! second serial port in. The parts:
//!
//! - `job.sh`, the script that the guest's `/bin/sh` runs. A small read-only disk behind the user's disks has it, since a kernel
//!   command line has room for 2047 printable bytes only; the command line says `init=/bin/sh -- /dev/vdX`.
//! - `frames`, which finds the output and the status in what the guest writes to the second serial port.
//! - `port`, the serial port, which lets the guest wait while its reader is slow.
//! - `output`, which moves the output to our standard output, and then tells the machine the status.
//!
//! A status is an event of the machine like a byte at the debug-exit port. A machine that ends in any other way has none, which
//! `cli` reports as an error: an exit status of 0 always is the command's own.

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

/// What the guest's shell runs, behind the definitions of `command` and `mark`.
const SCRIPT: &[u8] = include_bytes!("job.sh");
/// A disk is whole sectors long.
const SECTOR: usize = 512;

/// The configuration of a machine that runs the command, if there is one, and that command.
///
/// # Errors
/// When the host has no memory or no random numbers.
pub(crate) fn plan(config: &VmConfig) -> Result<(Cow<'_, VmConfig>, Option<Job>), Error> {
    let Some(command) = &config.exec else { return Ok((Cow::Borrowed(config), None)) };
    let job = Job::new(command).map_err(Error::host("write the script for --exec"))?;
    Ok((Cow::Owned(job.extend(config)), Some(job)))
}

/// Puts the second serial port on the bus, with its output on our standard output. Nothing without a job.
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

/// A command that a guest is to run.
pub(crate) struct Job {
    mark: String,
    /// In memory. The disk opens it again, by its name in /proc.
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
