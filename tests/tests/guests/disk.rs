//! What Linux sees of the disks' options, and what its tools do to the images.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use minivmm_tests::files::{Durable, allocated, sparse};
use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest, Report, assert_clean};
use minivmm_tests::session::Session;

const MIB: u64 = 1 << 20;

/// Prints everything that sysfs says about the disks.
const ATTRIBUTES: &str = r#"
for disk in /sys/block/vd?; do
    name=${disk##*/}
    # Without a scheduler nr_requests is the size of the queue.
    echo none >$disk/queue/scheduler
    for file in size ro serial cache_type queue/logical_block_size queue/physical_block_size queue/minimum_io_size \
        queue/optimal_io_size queue/discard_granularity queue/discard_max_bytes queue/write_zeroes_max_bytes \
        queue/write_cache queue/max_segments queue/nr_requests; do
        fact $name ${file##*/} $(cat $disk/$file)
    done
    fact $name queues $(ls $disk/mq | wc -l)
done
"#;

#[test]
fn attributes_equal_the_options() {
    let guest = Guest::new(
        CLOUD,
        &format!("{ATTRIBUTES}\nyes | dd of=/dev/vdf bs=512 count=1 conv=fsync; fact write $?\nsettle\noutb 0xf4 5"),
    )
    .with("--cpus 2 --debug-exit --cmdline root=")
    .with_disk("plain", MIB, "")
    .with_disk("named", 2 * MIB, "serial=twenty-bytes-exactly")
    .with_disk("4k", 4 * MIB, "logical-block-size=4096,physical-block-size=4096,min-io-size=8192,opt-io-size=65536")
    .with_disk("through", MIB, "cache=writethrough,discard=ignore,num-queues=1")
    .with_disk("single", MIB, "num-queues=1,queue-size=64,physical-block-size=4096")
    .with_disk("read-only", 3 * MIB, "readonly=on");
    let report = guest.run(5);
    let table: &[(&str, &[&str])] = &[
        (
            "vda",
            &[
                "size 2048",
                "ro 0",
                "serial",
                "queues 2",
                "write_cache write back",
                "logical_block_size 512",
            ],
        ),
        ("vdb", &["size 4096", "serial twenty-bytes-exactly"]),
        (
            "vdc",
            &[
                "size 8192",
                "logical_block_size 4096",
                "physical_block_size 4096",
                "minimum_io_size 8192",
                "optimal_io_size 65536",
            ],
        ),
        ("vdd", &["write_cache write through", "discard_max_bytes 0", "queues 1"]),
        (
            "vde",
            &["queues 1", "nr_requests 64", "logical_block_size 512", "physical_block_size 4096"],
        ),
        ("vdf", &["size 6144", "ro 1"]),
    ];
    for (disk, attributes) in table {
        let facts = report.all(disk);
        for attribute in *attributes {
            assert!(facts.contains(attribute), "{disk}: no {attribute:?} in {facts:#?}");
        }
    }
    // A guest can give space back unless that is switched off.
    let granularity = report
        .all("vda")
        .into_iter()
        .find_map(|fact| fact.strip_prefix("discard_granularity "))
        .unwrap();
    assert_ne!(granularity, "0");
    assert_ne!(report.get("write"), "0", "a write to the read-only disk succeeded");
    assert!(
        fs::read(guest.path("read-only")).unwrap().iter().all(|byte| *byte == 0),
        "the read-only disk was written"
    );
}

#[test]
fn discards_shrink_the_image_and_the_file_system_stays_clean() {
    let script = r#"
set -e
fill() { tr '\0' 'x' </dev/zero | head -c $1; }
fill 16777216 >/dev/vdb
sync
blkdiscard -o 4194304 -l 8388608 /dev/vdb
fact kept $(head -c 4194304 /dev/vdb | tr -d x | wc -c)
fact discarded $(dd if=/dev/vdb bs=1M skip=4 count=8 iflag=direct 2>/dev/null | tr -d '\0' | wc -c)
blkdiscard -z -o 12582912 -l 1048576 /dev/vdb
fact zeroed $(dd if=/dev/vdb bs=1M skip=12 count=1 iflag=direct 2>/dev/null | tr -d '\0' | wc -c)

mke2fs -q -t ext4 -E nodiscard /dev/vdc
mount -t ext4 /dev/vdc /mnt
fill 20971520 >/mnt/large
echo stays >/mnt/small
sync
fact before $(du -k /mnt/large | cut -f1)
rm /mnt/large
sync
fstrim -v /mnt
umount /mnt
fact done
"#;
    let guest = Guest::new(CLOUD, script).with_tools().with_disk("raw", 16 * MIB, "").with_disk(
        "ext4",
        64 * MIB,
        "aio=threads",
    );
    let report = guest.run(0);
    report.get("done");
    for fact in ["kept", "discarded", "zeroed"] {
        assert_eq!(report.number(fact), 0, "{fact}: {}", report.ended);
    }
    let raw = allocated(&guest.path("raw"));
    assert!(
        (4 * MIB..=8 * MIB).contains(&raw),
        "{raw} of 16 MiB are allocated, of which 8 or 9 were given back"
    );
    assert!(report.number("before") >= 20 << 10);
    let ext4 = allocated(&guest.path("ext4"));
    assert!(ext4 < 16 * MIB, "{ext4} bytes are still allocated after fstrim");
    assert_clean(&guest.path("ext4"));
}

/// Fifty times the driver lets go of a disk that is being read and written, and takes it again. Nothing is lost, and
/// nothing of the time before a reset is written after it.
#[test]
fn the_driver_comes_and_goes_under_load() {
    let script = r#"
set -e
device=$(basename $(readlink -f /sys/block/vdb/device))
driver=/sys/bus/virtio/drivers/virtio_blk
round=0
while [ $round -lt 50 ]; do
    dd if=/dev/vdb of=/dev/null bs=64k iflag=direct 2>/dev/null &
    reader=$!
    # By way of an open descriptor: dd would make a file where the device is gone.
    exec 3<>/dev/vdb
    dd if=/dev/zero of=/proc/self/fd/3 bs=64k seek=8 oflag=direct 2>/dev/null &
    writer=$!
    exec 3>&-
    echo $device >$driver/unbind
    wait $reader || true
    wait $writer || true
    echo $device >$driver/bind
    until [ -b /dev/vdb ]; do :; done
    round=$((round + 1))
done
fact rounds $round
yes "round $round" | dd of=/dev/vdb bs=512 count=1 iflag=fullblock oflag=direct 2>/dev/null
sync
fact errors $(dmesg | grep -c 'needs reset' || true)
"#;
    let guest =
        Guest::new(CLOUD, script).with("--cpus 2").with_tools().with_disk("disk", 4 * MIB, "");
    let report = guest.run(0);
    assert_eq!(report.number("rounds"), 50, "{}", report.ended);
    assert_eq!(report.number("errors"), 0, "{}", report.ended);
    let mut sector = [0; 512];
    File::open(guest.path("disk")).unwrap().read_exact_at(&mut sector, 0).unwrap();
    assert!(sector.starts_with(b"round 50\nround 50\n"), "{}", String::from_utf8_lossy(&sector));
}

/// Linux turns a disk's write cache off and on again. With it, every synchronous write of the guest's is a write and an
/// fdatasync on the host; without it, the write alone is durable.
#[test]
fn the_write_cache_can_be_switched() {
    if Command::new("strace").arg("-V").output().is_err() {
        minivmm_tests::skip("strace is not installed");
        return;
    }
    const WRITES: usize = 20;
    let script = r#"
cache=/sys/block/vdb/cache_type
writes() {
    fio --name=w --filename=/dev/vdb --rw=write --bs=512 --offset=$1 --size=10240 --direct=1 --fsync=1 --ioengine=psync \
        >/dev/null || fact failed $?
}
fact cache $(cat $cache) $(cat /sys/block/vdb/queue/write_cache)
writes 0
echo 'write through' >$cache
fact cache $(cat $cache) $(cat /sys/block/vdb/queue/write_cache)
writes 1048576
echo 'write back' >$cache
fact cache $(cat $cache) $(cat /sys/block/vdb/queue/write_cache)
writes 2097152
"#;
    let Some(directory) = Durable::new() else { return };
    let image = directory.path().join("disk");
    sparse(&image, 4 * MIB);
    let disk = format!("--disk {},aio=threads,num-queues=1", image.display());
    let guest = Guest::new(CLOUD, script).with_tools().with(&disk);
    let minivmm = guest.command();
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "calls", "-e", "trace=pwrite64,pwritev,pwritev2,fdatasync"]);
    command.arg(minivmm.get_program()).args(minivmm.get_args()).current_dir(guest.path(""));
    let report = Report::new(Session::start(&mut command).wait(BOOT_BOUND).must_be(0));
    let (back, through) = ("write back write back", "write through write through");
    assert_eq!(report.all("cache"), [back, through, back]);
    assert!(report.all("failed").is_empty(), "{}", report.ended);

    // Writes, durable writes, and flushes, from the first write at or above an offset to the last one below another.
    let calls = fs::read_to_string(guest.path("calls")).unwrap();
    let count = |from: u64, to: u64| {
        let phase =
            |line: &&str| offset_of(line).is_some_and(|offset| (from..to).contains(&offset));
        let lines: Vec<_> = calls.lines().collect();
        let first = lines.iter().position(phase).expect("a write");
        let last = lines.iter().rposition(phase).expect("a write");
        let writes: Vec<_> = lines[first..=last].iter().filter(|line| phase(line)).collect();
        let durable = writes.iter().filter(|line| line.contains("DSYNC")).count();
        (
            writes.len(),
            durable,
            lines[first..=last].iter().filter(|line| line.contains("fdatasync(")).count(),
        )
    };
    // The flush behind the last write is not between the writes.
    assert_eq!(count(0, MIB), (WRITES, 0, WRITES - 1), "{calls}");
    assert_eq!(count(MIB, 2 * MIB), (WRITES, WRITES, 0), "{calls}");
    assert_eq!(count(2 * MIB, 4 * MIB), (WRITES, 0, WRITES - 1), "{calls}");
}

/// The file offset of a write in strace's words: `pwritev2(9, [{iov_base="x"..., iov_len=512}], 1, 1024, RWF_DSYNC) = 512`.
fn offset_of(line: &str) -> Option<u64> {
    let (_, arguments) = line.split_once("pwrite")?;
    let (_, after_data) =
        arguments.rsplit_once("], 1, ").or_else(|| arguments.rsplit_once("\"..., 512, "))?;
    after_data.split([',', ')']).next()?.parse().ok()
}
