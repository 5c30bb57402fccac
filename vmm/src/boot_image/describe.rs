//! Says what the guest starts from, and warns of a file that is no initrd.
//!
//! A capability: the builder calls [`describe`] once, and loading does without it. `arch::boot::signatures` knows the first bytes of
//! files.

use std::sync::Arc;

use arch::boot::{self, ReadAt};
use devices::disk::Disk;

use super::{BootFile, BootImage};
use crate::config::{DiskConfig, VmConfig};

/// Logs what the guest starts from, and warns of an initrd that Linux cannot unpack. `disks` are those of `config`, opened.
pub(crate) fn describe(config: &VmConfig, boot: Option<&BootImage>, disks: &[Arc<dyn Disk>]) {
    boot.into_iter().for_each(BootImage::describe);
    for (DiskConfig { image, device, .. }, opened) in config.disks.iter().zip(disks) {
        let (path, format, aio) =
            (image.path.display(), image.format.unwrap_or_default(), image.aio);
        let (name, size, cache) = (&device.name, opened.capacity(), image.cache);
        tracing::debug!("disk {name}: {path}, {size} bytes, {format}, {aio}, cache={cache}");
    }
    tracing::debug!("memory: {} MiB, vCPUs: {}", config.memory >> 20, config.cpus);
}

impl BootImage {
    fn describe(&self) {
        let BootFile { path, opened, .. } = &self.kernel;
        let (path, size, protocol) = (path.display(), opened.size, self.plan.entry.protocol);
        tracing::debug!("kernel {path}: {size} bytes, boot protocol {protocol:?}");
        if let Some(initrd) = &self.initrd {
            let path = initrd.path.display();
            tracing::debug!("initrd {path}: {} bytes", initrd.opened.size);
            if initrd.read_at(0, 512).is_ok_and(|start| !boot::is_initrd(&start)) {
                tracing::warn!(
                    "--initrd {path}: neither a cpio archive nor a compressed one; Linux will not unpack it"
                );
            }
        }
    }
}
