//! `fault=` of disks: puts faults around an image. A capability: the builder calls [`over`], and `devices::disk::injected_faults`
//! does the rest.

use std::sync::Arc;

use devices::disk::Disk;
use devices::disk::injected_faults;

use crate::config::DiskConfig;

/// Puts the faults of each disk around its image. `cli` has checked what the user wrote; `none` is no rule.
pub(crate) fn over(images: &mut [Arc<dyn Disk>], disks: &[DiskConfig]) {
    for (image, disk) in
        images.iter_mut().zip(disks).filter(|(_, disk)| !disk.image.faults.is_empty())
    {
        let rules = disk.image.faults.iter().filter_map(|rule| rule.parse().ok()).collect();
        *image = injected_faults::over(Arc::clone(image), rules);
    }
}
