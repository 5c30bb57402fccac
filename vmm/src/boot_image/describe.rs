//! Says what the guest starts from, and warns of a file that is no initrd.
//!
//! A capability: the builder calls [`BootImage::describe`] once, and loading does without it. `arch::boot::signatures` knows
//! the first bytes of files.

use arch::boot::{self, ReadAt};

use super::{BootFile, BootImage};

impl BootImage {
    /// Logs what the guest starts from, and warns of an initrd that Linux cannot unpack.
    pub(crate) fn describe(&self) {
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
