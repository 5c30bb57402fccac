//! `snapshot=on`: a temporary qcow2 image over the one that the user named. Its file has no name, so the kernel frees it when it is
//! closed, even if minivmm is killed.

use std::io;
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder};

use super::chain::Opened;
use super::header::Header;
use super::ordered::OrderedStorage;
use super::storage::HostStorage;
use crate::disk::host_file::{FileKind, HostFile};
use crate::disk::{OpenReason, SECTOR, temporary_file};

/// Makes an empty qcow2 image over `base`.
pub(super) fn temporary_overlay(base: Opened) -> Result<Opened, OpenReason> {
    let below = base.with_below();
    let base = base.layer;
    let (directory, file) = temporary_file::create(std::env::var_os("TMPDIR"));
    let (backing, size) = (base.size(), base.size() - base.size() % SECTOR);
    let create = || -> io::Result<Opened> {
        let file = HostFile::new(file?, FileKind::Regular, None);
        let storage = OrderedStorage::plain(HostStorage::new(&directory, &Arc::new(file), true)?);
        let overlay = Qcow2::create_builder(storage.clone())
            .size(size)
            .create_open(DenyImplicitOpenGate::default(), |storage| {
                Ok(Qcow2::builder(storage).backing(Some(base)))
            })?;
        let layer = FormatAccess::new(overlay);
        Ok(Opened { layer, storage, header: Header::OF_OVERLAY, backing, below, itself: None })
    };
    create().map_err(|source| OpenReason::Overlay { directory, source })
}
