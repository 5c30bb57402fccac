//! The write threshold: one event for the first change past an offset.

use super::rig::{Outcome, Rig};
use crate::block::BlockEvent;
use crate::virtio::spec::blk::{self, Segment};

fn hit(threshold: u64, exceeded: u64) -> BlockEvent {
    BlockEvent::WriteThreshold { device: "vda".to_owned(), threshold, exceeded }
}

fn write(rig: &mut Rig, sector: u64, sectors: usize) -> Vec<BlockEvent> {
    let sent = rig.driver.send_write(0, sector, &vec![7; sectors * 512]);
    assert_eq!(rig.outcome(&sent), Outcome::ok(0));
    rig.events()
}

#[test]
fn the_first_write_past_it_is_reported_once() {
    let mut rig = Rig::new();
    assert_eq!(write(&mut rig, 60, 4), [], "none is set");
    rig.shared().set_write_threshold(Some(4096));
    assert_eq!(write(&mut rig, 0, 8), [], "up to it is not past it");
    let read = rig.driver.send_read(0, 60, 512);
    assert_eq!((rig.outcome(&read), rig.events()), (Outcome::ok(512), vec![]));
    assert_eq!(rig.shared().write_threshold(), Some(4096));
    assert_eq!(write(&mut rig, 7, 3), [hit(4096, 1024)]);
    assert_eq!(rig.shared().write_threshold(), None);
    assert_eq!(write(&mut rig, 60, 4), [], "the event was the last one");
    rig.shared().set_write_threshold(Some(512));
    rig.shared().set_write_threshold(None);
    assert_eq!(write(&mut rig, 60, 4), []);
}

#[test]
fn discards_and_zeroes_count_by_their_furthest_segment() {
    for request in [blk::T_DISCARD, blk::T_WRITE_ZEROES, blk::T_SECURE_ERASE] {
        let mut rig = Rig::new();
        rig.shared().set_write_threshold(Some(512));
        let segments = [(40, 8, 0), (0, 8, 0)];
        let list = segments
            .map(|(sector, sectors, flags)| Segment { sector, sectors, flags }.to_le_bytes());
        let data = rig.driver.readable(&list.concat());
        assert_eq!(rig.request(request, 0, Some(data)), Outcome::ok(0));
        assert_eq!(rig.events(), [hit(512, 47 * 512)]);
    }
}
