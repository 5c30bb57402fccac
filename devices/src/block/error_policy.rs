//! The error policy (`rerror`, `werror`): what becomes of a request that the host failed. It decides; the worker acts.

use super::events::ErrorAction;
use super::options::ErrorPolicy;
use crate::disk::DiskError;

/// What `policy` says to do about `error`. `None`: the error is the driver's to know and no failure of the host, so the
/// policy has no say.
pub(super) fn decide(policy: ErrorPolicy, error: DiskError) -> Option<ErrorAction> {
    Some(match (policy, error) {
        // The image shrank under a request that was in bounds when it was parsed, or does not support the operation.
        (_, DiskError::Unsupported | DiskError::OutOfRange) => return None,
        (ErrorPolicy::Ignore, _) => ErrorAction::Ignore,
        (ErrorPolicy::Stop, _) | (ErrorPolicy::Enospc, DiskError::NoSpace) => ErrorAction::Stop,
        (ErrorPolicy::Report | ErrorPolicy::Enospc, _) => ErrorAction::Report,
    })
}
