//! What can go wrong for `minivmm ctl`. Like every error, it is printed once, with its causes.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::arguments::value::ValueError;

/// Why a command failed. The socket's path stands before it in the line.
#[derive(Debug, thiserror::Error)]
pub(super) enum CtlError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no VM listens there ({0}); give the path of a running VM's --qmp unix:PATH")]
    NoListener(io::Error),
    #[error("the connection to the VM was lost; check that it still runs")]
    Connection(#[from] io::Error),
    #[error("it is not the control socket of a VM; give the path of its --qmp unix:PATH")]
    NotQmp,
    #[error("no answer within {} s; is it the control socket of a running VM?", .0.as_secs())]
    NoGreeting(Duration),
    #[error("the VM ended before it answered")]
    Ended,
    #[error("{0}")]
    Refused(String),
    #[error("save: {0}")]
    Save(String),
    #[error("save: {}", .0.display())]
    Target(PathBuf, #[source] io::Error),
    #[error(
        "resize {disk}: the disk has {present}, and a smaller size loses the data at its end; add --shrink to do that"
    )]
    Shrink { disk: String, present: String },
    #[error("throttle: {0} has no value; write {0}=N")]
    LimitWithoutValue(String),
    #[error("throttle: {limit}")]
    Limit { limit: String, source: ValueError },
}
