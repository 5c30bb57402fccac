//! `rerror` and `werror`: who hears of a host error, and what is stopped.

use std::time::Instant;

use virtio_queue::desc::split::Descriptor;

use super::driver::Sent;
use super::rig::Rig;
use crate::block::{BlockEvent, ErrorAction, ErrorPolicy, IoStatus, Kind, QueueSnapshot};
use crate::disk::{DiskError, Operation};
use crate::log_limit::tests::Log;
use crate::virtio::spec::blk;

const EIO: DiskError = DiskError::Host(libc::EIO);

fn rig(policy: ErrorPolicy) -> Rig {
    Rig::with(|setup| (setup.options.read_errors, setup.options.write_errors) = (policy, policy))
}

fn io_error(operation: Kind, action: ErrorAction, error: DiskError) -> BlockEvent {
    BlockEvent::IoError { device: "vda".to_owned(), operation, action, error }
}

#[test]
fn what_each_policy_does() {
    use ErrorAction as Action;
    use ErrorPolicy as Policy;
    for (policy, error, action) in [
        (Policy::Report, EIO, Action::Report),
        (Policy::Report, DiskError::NoSpace, Action::Report),
        (Policy::Ignore, EIO, Action::Ignore),
        (Policy::Ignore, DiskError::NoSpace, Action::Ignore),
        (Policy::Stop, EIO, Action::Stop),
        (Policy::Stop, DiskError::NoSpace, Action::Stop),
        (Policy::Enospc, EIO, Action::Report),
        (Policy::Enospc, DiskError::NoSpace, Action::Stop),
    ] {
        for write in [false, true] {
            let mut rig = rig(policy);
            rig.disk.fail(error);
            let sent = if write {
                rig.driver.send_write(0, 0, &[1; 512])
            } else {
                rig.driver.send_read(0, 0, 512)
            };
            rig.serve();
            let operation = if write { Kind::Write } else { Kind::Read };
            assert_eq!(rig.events(), [io_error(operation, action, error)]);
            let (used, status) = (rig.driver.used(0), rig.driver.status(&sent));
            let stats = *rig.stats().kind(operation);
            match action {
                Action::Report => {
                    assert_eq!((used, status), (vec![(sent.head, 1)], blk::S_IOERR));
                    assert_eq!((stats.operations, stats.errors), (0, 1));
                }
                Action::Ignore => {
                    let length = if write { 1 } else { 513 };
                    assert_eq!((used, status), (vec![(sent.head, length)], blk::S_OK));
                    assert_eq!((stats.operations, stats.errors), (1, 0));
                }
                Action::Stop => {
                    assert_eq!((used, rig.driver.line.count()), (vec![], 0));
                    assert_eq!((stats.operations, stats.errors), (0, 0));
                    let status = if error == DiskError::NoSpace {
                        IoStatus::NoSpace
                    } else {
                        IoStatus::Failed
                    };
                    assert_eq!(rig.shared().host_errors.io_status(), status);
                }
            }
            if action != Action::Stop {
                assert_eq!(rig.shared().host_errors.io_status(), IoStatus::Ok);
            }
        }
    }
}

#[test]
fn the_line_of_a_host_error_says_what_follows() {
    const EIO_TEXT: &str = "host I/O error: Input/output error (os error 5)";
    const FULL: &str = "no space left on the host";
    const CONT: &str = "then `minivmm ctl SOCKET cont`";
    for (policy, error, line) in [
        (ErrorPolicy::Report, EIO, format!("{EIO_TEXT}; werror=report: the guest gets the error")),
        (
            ErrorPolicy::Ignore,
            EIO,
            format!("{EIO_TEXT}; werror=ignore: the guest does not see the error"),
        ),
        (
            ErrorPolicy::Stop,
            EIO,
            format!("{EIO_TEXT}; werror=stop: the VM is stopped; mend the storage, {CONT}"),
        ),
        (
            ErrorPolicy::Enospc,
            DiskError::NoSpace,
            format!("{FULL}; werror=enospc: the VM is stopped; make space, {CONT}"),
        ),
    ] {
        let log = Log::default();
        let _logging = log.listen();
        let mut rig = rig(policy);
        rig.disk.fail(error);
        rig.driver.send_write(0, 0, &[1; 512]);
        rig.serve();
        assert_eq!(log.lines(), [format!("WARNmessage=disk vda: a write failed: {line} ")]);
    }
}

#[test]
fn reads_and_writes_have_policies_of_their_own() {
    let mut rig = Rig::new();
    rig.disk.fail(DiskError::NoSpace);
    rig.driver.send_read(0, 0, 512);
    rig.serve();
    rig.driver.send_flush(0);
    rig.serve();
    let no_space = |operation, action| io_error(operation, action, DiskError::NoSpace);
    // The defaults: report for reads, enospc for everything that changes the disk.
    assert_eq!(
        rig.events(),
        [no_space(Kind::Read, ErrorAction::Report), no_space(Kind::Flush, ErrorAction::Stop)]
    );
}

/// Three writes fail under `stop`, far enough apart not to merge.
fn stopped() -> (Rig, Vec<Sent>) {
    let mut rig = rig(ErrorPolicy::Stop);
    rig.disk.fail(EIO);
    let sent =
        [30, 10, 20].map(|sector| rig.driver.send_write(0, sector, &[sector as u8 + 100; 512]));
    rig.serve();
    assert_eq!(rig.events().len(), 3);
    (rig, sent.into())
}

#[test]
fn a_stopped_disk_stands_still() {
    let (mut rig, _) = stopped();
    rig.disk.heal();
    let tried = rig.disk.log().len();
    rig.driver.send_read(0, 0, 512);
    rig.serve();
    assert_eq!(rig.driver.used(0), []);
    assert_eq!(rig.disk.log().len(), tried);
}

#[test]
fn resume_retries_in_order_and_goes_on() {
    let (mut rig, sent) = stopped();
    let read = rig.driver.send_read(0, 10, 512);
    rig.serve();
    let tried = rig.disk.log();
    rig.disk.heal();
    rig.worker().resume();
    // The order of failure, which was the order on the disk; then what came while the disk stood still.
    let offsets =
        |log: &[super::disk::Seen]| log.iter().map(|seen| seen.offset / 512).collect::<Vec<_>>();
    assert_eq!(offsets(&tried), [10, 20, 30]);
    assert_eq!(offsets(&rig.disk.log()[3..]), [10, 20, 30, 10]);
    let mut used = rig.driver.used(0);
    used.sort_unstable();
    let mut expected: Vec<_> = sent.iter().map(|sent| (sent.head, 1)).collect();
    expected.push((read.head, 513));
    assert_eq!(used, expected);
    assert_eq!(rig.driver.data(&read), [110; 512]);
    assert!(sent.iter().all(|sent| rig.driver.status(sent) == blk::S_OK));
    let stats = *rig.stats().kind(Kind::Write);
    assert_eq!((stats.operations, stats.errors), (3, 0));
}

#[test]
fn a_retry_may_fail_again() {
    let (mut rig, sent) = stopped();
    rig.worker().resume();
    assert_eq!(rig.events().len(), 3);
    assert_eq!(rig.driver.used(0), []);
    rig.disk.heal();
    rig.worker().resume();
    assert_eq!(rig.driver.used(0).len(), sent.len());
    assert_eq!(rig.disk.log().len(), 9);
}

#[test]
fn merged_writes_are_stopped_one_by_one() {
    let mut rig = rig(ErrorPolicy::Stop);
    rig.disk.judge(|seen| {
        if seen.offset + seen.length > 6 * 512 { Err(DiskError::NoSpace) } else { Ok(()) }
    });
    let sent = [4, 5, 6, 7].map(|sector| rig.driver.send_write(0, sector, &[0x99; 512]));
    rig.serve();
    // What fits is written and answered; the rest is stopped.
    assert_eq!(rig.driver.used(0), [(sent[0].head, 1), (sent[1].head, 1)]);
    assert_eq!(rig.events().len(), 2);
    rig.disk.heal();
    rig.worker().resume();
    assert_eq!(rig.driver.used(0), [(sent[2].head, 1), (sent[3].head, 1)]);
    assert_eq!(rig.disk.data()[4 * 512..8 * 512], [0x99; 4 * 512]);
}

#[test]
fn a_stopped_discard_starts_over() {
    let mut rig = rig(ErrorPolicy::Stop);
    rig.disk.judge(|seen| if seen.offset > 0 { Err(EIO) } else { Ok(()) });
    let segments = [
        blk::Segment { sector: 0, sectors: 8, flags: 0 },
        blk::Segment { sector: 8, sectors: 8, flags: 0 },
    ];
    let bytes = segments.map(blk::Segment::to_le_bytes).concat();
    let data = rig.driver.readable(&bytes);
    let sent = rig.driver.send(0, blk::T_DISCARD, 0, Some(data));
    rig.serve();
    rig.disk.heal();
    rig.worker().resume();
    assert_eq!(rig.driver.used(0), [(sent.head, 1)]);
    assert_eq!(rig.disk.operations(), [Operation::Discard; 4]);
}

#[test]
fn a_reset_drops_what_was_stopped() {
    let (mut rig, sent) = stopped();
    rig.disk.heal();
    let before = rig.disk.data();
    rig.reset();
    rig.worker().resume();
    assert_eq!(rig.disk.data(), before);
    assert!(sent.iter().all(|sent| rig.driver.status(sent) == super::driver::UNTOUCHED));
    rig.assert_alive();
}

#[test]
fn stopped_chains_that_the_driver_broke_meanwhile() {
    let (mut rig, sent) = stopped();
    rig.disk.heal();
    let tried = rig.disk.log().len();
    for sent in &sent {
        // A loop.
        rig.driver.set_descriptor(
            0,
            sent.head,
            Descriptor::new(0, 0, super::driver::NEXT, sent.head),
        );
    }
    rig.worker().resume();
    assert_eq!((rig.driver.used(0), rig.disk.log().len()), (vec![], tried));
    assert_eq!(rig.stats().broken_rings, 1);
    assert_eq!(rig.driver.interrupt.needs_reset(), crate::virtio::spec::STATUS_DEVICE_NEEDS_RESET);
    rig.reset();
    rig.assert_alive();
}

#[test]
fn a_ring_reset_drops_only_its_own() {
    let mut rig = Rig::with(|setup| {
        setup.options.write_errors = ErrorPolicy::Stop;
        setup.options.num_queues = 2;
        setup.queues = 2;
    });
    rig.disk.hold();
    rig.disk.fail(EIO);
    let sent = [0, 1].map(|ring| rig.driver.send_write(ring, 5 * ring as u64, &[0x42; 512]));
    rig.serve();
    rig.worker().serve(1);
    rig.release(2);
    assert_eq!(rig.events().len(), 2);
    assert!(rig.remove_queue(0).is_some());
    rig.disk.heal();
    rig.worker().resume();
    rig.release(1);
    assert_eq!(rig.driver.used(1), [(sent[1].head, 1)]);
    assert_eq!(rig.disk.data()[5 * 512..6 * 512], [0x42; 512]);
    assert_eq!(rig.disk.data()[..512], [0; 512]);
}

#[test]
fn a_stopped_request_survives_a_snapshot() {
    let (mut rig, sent) = stopped();
    let heads = rig.stopped();
    assert_eq!(heads.len(), 3);
    // The queue itself is saved and restored by the transport.
    let queue = rig.remove_queue(0).unwrap();
    rig.disk.heal();
    rig.pause();
    rig.worker().add_queue(0, queue);
    let stopped = |heads: Vec<u16>| QueueSnapshot { stopped: heads, ..Default::default() };
    assert!(rig.worker().restore(0, &stopped(heads)));
    assert!(!rig.worker().restore(0, &stopped(vec![64])));
    assert!(!rig.worker().restore(9, &stopped(vec![0])));
    rig.worker().resume();
    assert_eq!(rig.driver.used(0).len(), 3);
    assert!(sent.iter().all(|sent| rig.driver.status(sent) == blk::S_OK));
}

#[test]
fn a_paused_disk_answers_what_it_has_and_takes_no_more() {
    let mut rig = Rig::new();
    rig.disk.hold();
    let first = rig.driver.send_read(0, 1, 512);
    rig.serve();
    rig.pause();
    assert_eq!(rig.driver.used(0), [(first.head, 513)]);
    let second = rig.driver.send_read(0, 2, 512);
    rig.serve();
    assert_eq!((rig.driver.used(0), rig.disk.held()), (vec![], 0));
    rig.worker().resume();
    rig.release(1);
    assert_eq!(rig.driver.used(0), [(second.head, 513)]);
}

#[test]
fn a_failing_disk_does_not_flood_the_vm_with_events() {
    let mut rig = rig(ErrorPolicy::Report);
    rig.disk.fail(EIO);
    let start = Instant::now();
    for _ in 0..20 {
        for sector in 0..20 {
            rig.driver.send_read(0, 3 * sector, 512);
        }
        rig.serve();
        assert_eq!(rig.driver.used(0).len(), 20);
    }
    // 64 a second, and the guest is answered all the same.
    let events = rig.events().len();
    let most = 64 * (start.elapsed().as_secs() as usize + 2);
    assert!((64..=most).contains(&events), "{events}");
    assert_eq!(rig.stats().kind(Kind::Read).errors, 400);
}
