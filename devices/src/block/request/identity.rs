//! Requests for what the disk is: its serial number (GET_ID), and how worn its medium is (GET_LIFETIME; virtio 1.2 §5.2.6).
//!
//! A capability: `device` plugs [`Identity`] in as [`RequestTypes`].

use super::{Action, Details, RequestTypes, Unsuitable};
use crate::GuestMemory;
use crate::block::stats::Kind;
use crate::disk::{Disk, Lifetime};
use crate::virtio::queue::{ChainBuffers, write_into};
use crate::virtio::spec::blk;

/// The answers of one disk.
pub(in crate::block) struct Identity {
    /// The serial number, padded with NUL.
    id: [u8; blk::ID_SIZE],
    lifetime: blk::Lifetime,
}

impl Identity {
    /// What the host does not tell of the lifetime is 0.
    pub(in crate::block) fn new(serial: Option<&str>, lifetime: Option<Lifetime>) -> Self {
        let mut id = [0; blk::ID_SIZE];
        let serial = serial.unwrap_or_default().as_bytes();
        id.iter_mut().zip(serial).for_each(|(id, byte)| *id = *byte);
        let lifetime = lifetime.map_or(blk::Lifetime::default(), |lifetime| blk::Lifetime {
            pre_eol_info: lifetime.pre_eol_info,
            estimate_type_a: lifetime.device_lifetime_est_typ_a,
            estimate_type_b: lifetime.device_lifetime_est_typ_b,
        });
        Self { id, lifetime }
    }
}

impl RequestTypes for Identity {
    fn parse(
        &self,
        request_type: u32,
        buffers: &mut ChainBuffers,
        memory: &GuestMemory,
        details: &mut Details,
    ) -> Option<(Kind, Result<Action, Unsuitable>)> {
        let lifetime = self.lifetime.to_le_bytes();
        let answer: &[u8] = match request_type {
            blk::T_GET_ID => &self.id,
            blk::T_GET_LIFETIME if details.limits.features & blk::F_LIFETIME != 0 => &lifetime,
            _ => return None,
        };
        details.written = write_into(memory, buffers.writable(), answer) as u32;
        Some((Kind::Other, Ok(Action::Answered)))
    }

    fn offer(&self, disk: &dyn Disk, features: &mut u64, _: &mut blk::Config) {
        if disk.info().lifetime.is_some() {
            *features |= blk::F_LIFETIME;
        }
    }
}
