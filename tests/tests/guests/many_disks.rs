//! More disks than interrupt lines.

use minivmm_tests::linux::{CLOUD, Guest};

/// With the tools disk there are 64. The first eight have a line of their own, and seven share each of the other eight lines.
const IMAGES: usize = 63;

/// All disks but the first 15 are written, read back and compared at the same time, with four requests in flight each. An interrupt that
/// is lost leaves its disk waiting, and a line whose interrupts no handler takes is turned off.
const SCRIPT: &str = r#"
jobs=
for disk in /sys/block/vd*; do
    name=${disk##*/}
    case $name in vd[a-o]) ;; *) jobs="$jobs --name=$name --filename=/dev/$name" ;; esac
done
fact disks $(ls -d /sys/block/vd* | wc -l)
fio --rw=randrw --bs=4k --size=256k --direct=1 --ioengine=libaio --iodepth=4 --verify=crc32c --verify_fatal=1 --thread $jobs \
    --output-format=json >/run/fio.json
fact fio $?
fact jobs $(grep -c '"jobname"' /run/fio.json)
grep virtio /proc/interrupts | while read -r line; do fact line $line; done
dmesg -r | grep -iE 'disabling irq|timeout|timed out|hung|stall|I/O error' | while read -r line; do fact complaint $line; done
"#;

#[test]
fn sixty_four_disks_share_sixteen_interrupt_lines_and_lose_no_interrupt() {
    let mut guest = Guest::new(CLOUD, SCRIPT).with_tools().with("--cpus 2");
    for number in 0..IMAGES {
        guest = guest.with_disk(&format!("disk-{number}"), 1 << 20, "");
    }
    let report = guest.run(0);
    assert_eq!(report.number("disks"), 64, "{}", report.ended);
    assert_eq!(report.number("fio"), 0, "{}", report.ended);
    assert_eq!(report.number("jobs"), 49);
    assert_eq!(report.all("complaint"), [""; 0]);
    let lines = report.all("line");
    assert_eq!(lines.len(), 16, "{lines:#?}");
    let sharers = lines.iter().map(|line| line.matches("virtio").count());
    assert_eq!(sharers.filter(|count| *count == 1).count(), 8, "{lines:#?}");
    assert_eq!(report.ended.errors, "", "{}", report.ended);
}
