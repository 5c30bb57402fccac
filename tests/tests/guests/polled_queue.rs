//! A guest that polls a queue of its disk (`virtio_blk.poll_queues`) is not interrupted for it.

use minivmm_tests::linux::{CLOUD, Guest};
use serde_json::Value;

const REQUESTS: u64 = 500;

#[test]
fn requests_of_a_polled_queue_interrupt_nothing() {
    let fio = format!(
        "fio --name=polled --filename=/dev/vdb --rw=randread --bs=4k --direct=1 --ioengine=io_uring --hipri --iodepth=4 \
         --number_ios={REQUESTS} --randseed=1 --output-format=json >/run/fio.json"
    );
    let script = format!(
        "fact polls $(cat /sys/block/vdb/queue/io_poll)
         count() {{ grep virtio1 /proc/interrupts | while read -r line first second rest; do echo $((first + second)); done; }}
         before=$(count)
         {fio}
         fact fio $?
         fact interrupts $(($(count) - before))
         result /run/fio.json\n"
    );
    let guest = Guest::new(CLOUD, &script).with_tools().with_disk("disk", 64 << 20, "");
    // The driver makes no more queues than there are CPUs, and keeps one that interrupts.
    let guest = guest.with("--cpus 2 --cmdline virtio_blk.poll_queues=1").with_results();
    let report = guest.run(0);
    assert_eq!(report.number("fio"), 0, "{}", report.ended);
    assert_eq!(report.number("polls"), 1);
    let fio: Value = serde_json::from_str(&guest.results()[0]).unwrap();
    assert_eq!(fio["jobs"][0]["read"]["total_ios"].as_u64(), Some(REQUESTS), "{fio:#}");
    // fio reads a little of the disk by the other queue first.
    let interrupts = report.number("interrupts");
    assert!(interrupts < REQUESTS / 10, "{interrupts} interrupts for {REQUESTS} requests");
}
