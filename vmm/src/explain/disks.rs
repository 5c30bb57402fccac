//! A disk as its driver will find it: read from its registers, in the order in which a driver reads them (virtio 1.2 §3.1.1).

use devices::bus::BusDevice;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::spec::blk::Config;
use devices::virtio::spec::mmio::{CONFIG_OFFSET, Register};
use devices::virtio::spec::names;

use super::rows::item;
use crate::lock;
use crate::machine::MachineDisk;

pub(super) fn describe(disk: &MachineDisk) -> Vec<String> {
    let (image, window) = (&disk.config.image, disk.window);
    let mut transport = lock(&disk.transport);
    let features = features(&mut transport);
    let mut config = [0; Config::SIZE];
    transport.read(CONFIG_OFFSET, &mut config);
    let queues: Vec<_> = (0..)
        .map_while(|index| queue_size(&mut transport, index))
        .map(|size| size.to_string())
        .collect();
    let access = match (image.read_only, image.snapshot) {
        (true, _) => "read-only",
        (false, true) => "writes go to a temporary overlay",
        (false, false) => "read-write",
    };
    let format = image.format.unwrap_or_default();
    vec![
        format!("Disk {}", disk.config.id),
        item("image", format_args!("{}, {format}, {access}", image.path.display())),
        item("engine", format_args!("aio={}, cache={}", image.aio, image.cache)),
        item("registers", format_args!("{:#x}, interrupt {}", window.base.0, window.gsi)),
        item("features", names::features(features)),
        item("queues of at most", queues.join(" ")),
        item("configuration space", names::config(&config, features)),
    ]
}

fn features(transport: &mut MmioTransport) -> u64 {
    let mut half = |number: u32| {
        transport.write(Register::DeviceFeaturesSel as u64, &number.to_le_bytes());
        u64::from(register(transport, Register::DeviceFeatures))
    };
    half(0) | half(1) << 32
}

/// `None`: there is no queue of this number.
fn queue_size(transport: &mut MmioTransport, index: u32) -> Option<u32> {
    transport.write(Register::QueueSel as u64, &index.to_le_bytes());
    Some(register(transport, Register::QueueNumMax)).filter(|size| *size != 0)
}

fn register(transport: &mut MmioTransport, register: Register) -> u32 {
    let mut bytes = [0; 4];
    transport.read(register as u64, &mut bytes);
    u32::from_le_bytes(bytes)
}
