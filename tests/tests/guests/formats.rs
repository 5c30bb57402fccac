//! Images that are not simply the disk: qcow2 with a backing file, and snapshots that vanish.

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::hash;
use minivmm_tests::linux::{CLOUD, Guest, artefact};

/// The same writes, discards and zeroes for any disk: deterministic, unaligned to clusters, and over one another.
const WRITES: &str = r#"
change() {
    n=0
    while [ $n -lt 40 ]; do
        sector=$((n * 397 % 16000))
        yes "write $n" | dd of=$1 bs=512 seek=$sector count=$((n % 7 + 1)) iflag=fullblock oflag=direct 2>/dev/null
        n=$((n + 1))
    done
    blkdiscard -z -o 1048576 -l 524288 $1
    yes again | dd of=$1 bs=4k seek=300 count=3 iflag=fullblock oflag=direct 2>/dev/null
    sync
}
"#;

fn qemu_img(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).current_dir(directory).output();
    let output = output.expect("qemu-img is installed (Debian: qemu-utils)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

#[test]
fn a_qcow2_with_a_backing_file_boots_and_holds_what_a_raw_image_would() {
    let script = format!(
        "{WRITES}
        fact root $(grep ' / ' /proc/mounts | cut -d' ' -f2-4)
        echo written >/etc/written && sync
        change /dev/vdb; change /dev/vdc; change /dev/vdd
        fact same $(md5sum </dev/vdb) $(md5sum </dev/vdc) $(md5sum </dev/vdd)"
    );
    let guest = Guest::new(CLOUD, &script);
    let directory = guest.path("");
    let tools = artefact("tools.img").into_os_string().into_string().unwrap();
    qemu_img(&directory, &["create", "-q", "-f", "qcow2", "-b", &tools, "-F", "raw", "root.qcow2"]);
    let content: Vec<u8> = (0..8u32 << 18).flat_map(u32::to_le_bytes).collect();
    fs::write(guest.path("raw"), &content).unwrap();
    fs::write(guest.path("base"), &content).unwrap();
    fs::write(guest.path("vanishing"), &content).unwrap();
    qemu_img(
        &directory,
        &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "overlay.qcow2"],
    );

    let guest = guest.with("--disk root.qcow2,format=qcow2,backing=on").with(
        "--disk overlay.qcow2,format=qcow2,backing=on --disk raw --disk vanishing,snapshot=on",
    );
    let report = guest.run(0);
    assert!(report.get("root").starts_with("/ ext4 rw"), "{}", report.get("root"));
    let sums: Vec<_> = report.get("same").split(' ').collect();
    assert!(
        matches!(sums[..], [a, _, b, _, c, _] if a == b && b == c),
        "the guest reads back {sums:?}"
    );

    for image in ["root.qcow2", "overlay.qcow2"] {
        qemu_img(&directory, &["check", "-q", "-f", "qcow2", image]);
    }
    qemu_img(&directory, &["compare", "-q", "-f", "qcow2", "-F", "raw", "overlay.qcow2", "raw"]);
    let unchanged = hash(&guest.path("base"));
    assert_eq!(hash(&guest.path("vanishing")), unchanged, "snapshot=on let a write through");
    assert_ne!(hash(&guest.path("raw")), unchanged);
    assert!(fs::read(guest.path("base")).unwrap() == content, "the backing file was written");
    let root = fs::metadata(guest.path("root.qcow2")).unwrap().len();
    assert!((1 << 18..64 << 20).contains(&root), "the overlay of the root disk has {root} bytes");
}
