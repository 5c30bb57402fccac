//! The error policy (`rerror`, `werror`): decides what becomes of a request that the host failed. The worker acts on it.

use super::events::ErrorAction;
use super::options::ErrorPolicy;
use crate::disk::DiskError;

/// What to do about `error` under `policy`. `None`: the request could not be done, but the host did not fail. The policy does
/// not apply, and the driver gets the error.
pub(super) fn decide(policy: ErrorPolicy, error: DiskError) -> Option<ErrorAction> {
    Some(match (policy, error) {
        // The image shrank under a request that was in bounds when it was parsed, or does not support the operation.
        (_, DiskError::Unsupported | DiskError::OutOfRange) => return None,
        (ErrorPolicy::Ignore, _) => ErrorAction::Ignore,
        (ErrorPolicy::Stop, _) | (ErrorPolicy::Enospc, DiskError::NoSpace) => ErrorAction::Stop,
        (ErrorPolicy::Report | ErrorPolicy::Enospc, _) => ErrorAction::Report,
    })
}
