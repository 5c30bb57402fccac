//! The fio boot test: a guest hammers a disk and verifies what it reads; the host then checks what the guest wrote.

use std::fs::File;
use std::os::unix::fs::FileExt;

use minivmm_tests::linux::{CLOUD, Guest};
use serde_json::Value;

const DISK: u64 = 64 << 20;
const FIO_SIZE: u64 = 12 << 20;
const BLOCK: u64 = 4096;

/// Where, in bytes, the guest writes a pattern of its own behind fio's part of the disk.
const PATTERN_OFFSETS: &[u64] = &[FIO_SIZE, 40 << 20, (40 << 20) + 3 * 512, DISK - 512];

/// A sector that says where it belongs.
fn pattern(offset: u64) -> Vec<u8> {
    format!("offset {offset:>20}\n").into_bytes().into_iter().cycle().take(512).collect()
}

fn script() -> String {
    let fio = format!(
        "fio --name=mixed --filename=/dev/vdb --size={FIO_SIZE} --rw=randrw --bs={BLOCK} --direct=1 --ioengine=libaio \
         --iodepth=16 --verify=crc32c --verify_fatal=1 --end_fsync=1 --randseed=1 --output-format=json"
    );
    let writes: Vec<_> = PATTERN_OFFSETS
        .iter()
        .map(|offset| {
            let sector = offset / 512;
            format!(
                "yes \"$(printf 'offset %20d' {offset})\" | dd of=/dev/vdb bs=512 seek={sector} count=1 iflag=fullblock \
                 oflag=direct 2>/dev/null"
            )
        })
        .collect();
    format!(
        "{fio} >/run/fio.json\nfact fio $?\nresult /run/fio.json\n{}\nsync\n",
        writes.join("\n")
    )
}

#[test]
fn fio_verifies_and_the_host_agrees() {
    let guest = Guest::new(CLOUD, &script()).with("--cpus 2").with_tools();
    let guest = guest.with_disk("disk", DISK, "").with_results();
    let report = guest.run(0);
    assert_eq!(report.number("fio"), 0, "{}", report.ended);
    check_fio(&guest.results()[0]);

    let image = File::open(guest.path("disk")).unwrap();
    assert_eq!(image.metadata().unwrap().len(), DISK);
    let sector = |offset: u64| {
        let mut bytes = vec![0; 512];
        image.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    for offset in PATTERN_OFFSETS {
        assert!(
            sector(*offset) == pattern(*offset),
            "the pattern at {offset:#x} is {:?}",
            sector(*offset)
        );
        // ... and nothing beside it.
        for neighbour in [offset.wrapping_sub(512), offset + 512] {
            let ours =
                PATTERN_OFFSETS.contains(&neighbour) || !(FIO_SIZE..DISK).contains(&neighbour);
            assert!(ours || sector(neighbour) == [0; 512], "something at {neighbour:#x}");
        }
    }
}

/// Zero errors, and every block once: written in the mixed phase and read back in the verification, or read in the mixed
/// phase.
fn check_fio(json: &str) {
    let json: Value = serde_json::from_str(json).unwrap_or_else(|why| panic!("{why}: {json}"));
    let job = &json["jobs"][0];
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} in {job:#}"));
    assert_eq!(number(&job["error"]), 0, "{job:#}");
    let (read, written) = (number(&job["read"]["io_bytes"]), number(&job["write"]["io_bytes"]));
    assert_eq!(read, FIO_SIZE, "{written} bytes were written");
    assert!(
        (FIO_SIZE / 4..FIO_SIZE * 3 / 4).contains(&written) && written % BLOCK == 0,
        "{written} bytes were written"
    );
    for kind in ["read", "write"] {
        assert_eq!(number(&job[kind]["short_ios"]) + number(&job[kind]["drop_ios"]), 0, "{kind}");
        assert_eq!(
            number(&job[kind]["total_ios"]),
            number(&job[kind]["io_bytes"]) / BLOCK,
            "{kind}"
        );
    }
}
