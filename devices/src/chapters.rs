//! The chapters about the disk, for readers of the generated documentation. No code: each module is a page of `devices/docs/`.

#[doc = include_str!("../docs/cut-the-power.md")]
pub mod cut_the_power {}

#[doc = include_str!("../docs/follow-one-reset.md")]
pub mod follow_one_reset {}

#[doc = include_str!("../docs/follow-one-write.md")]
pub mod follow_one_write {}

#[doc = include_str!("../docs/network-storage.md")]
pub mod disks_on_network_storage {}

#[doc = include_str!("../docs/virtio-blk.md")]
pub mod virtio_blk_by_clause {}

#[doc = include_str!("../docs/virtio-in-one-page.md")]
pub mod virtio_in_one_page {}
