//! The boot matrix: kernels and entries, ACPI or not, vCPUs, memory, disks, and ways to end. Not every combination, but
//! every value, and every pair that could matter to each other.

use std::collections::BTreeSet;

use minivmm_tests::linux::{Guest, Report, System, artefact};

const CLOUD_PVH: System = System { kernel: "linux-cloud/vmlinux", initrd: "initrd-cloud.cpio" };
const CLOUD_64: System =
    System { kernel: "linux-cloud/vmlinux-nopvh", initrd: "initrd-cloud.cpio" };
const CLOUD_BZ: System = System { kernel: "linux-cloud/vmlinuz", initrd: "initrd-cloud.cpio" };
/// Debian 13's kernel.
const NEWER_PVH: System =
    System { kernel: "linux-backports/vmlinux", initrd: "initrd-backports.cpio" };
const NEWER_BZ: System =
    System { kernel: "linux-backports/vmlinuz", initrd: "initrd-backports.cpio" };
const PLAIN_PVH: System = System { kernel: "linux-amd64/vmlinux", initrd: "initrd-amd64.cpio" };
const NO_ACPI_PVH: System =
    System { kernel: "linux-amd64/vmlinux", initrd: "initrd-amd64-cmdline.cpio" };
const NO_ACPI_64: System =
    System { kernel: "linux-amd64/vmlinux-nopvh", initrd: "initrd-amd64-cmdline.cpio" };
const NO_ACPI_BZ: System =
    System { kernel: "linux-amd64/vmlinuz", initrd: "initrd-amd64-cmdline.cpio" };

/// How the guest ends: what its script does last, and the exit status and words that follow.
struct End(&'static str, i32, &'static str);

/// The initrd's own: power off, or reboot where there is no ACPI.
const DEFAULT: End = End("", 0, "");
const REBOOT: End = End("settle; reboot -f", 0, "");
const DEBUG_EXIT: End = End("settle; outb 0xf4 77", 77, "");
/// A crash that the pvpanic module reports.
const PANIC: End = End("settle; echo c >/proc/sysrq-trigger", 3, "pvpanic port");
/// A crash without a report (no pvpanic module): the kernel resets the machine, and the monitor notices.
const SILENT_PANIC: End = End(
    "settle; rmmod pvpanic_mmio; echo c >/proc/sysrq-trigger",
    3,
    "reset itself after a kernel panic",
);

const ACPI: bool = true;
const NO_ACPI: bool = false;

/// Defines a test for each row.
macro_rules! matrix {
    ($($name:ident: $system:ident $acpi:ident $cpus:literal cpus $memory:literal MiB $disks:literal disks $end:ident;)+) => {
        $(#[test]
        fn $name() {
            boots($system, $acpi, $cpus, $memory, $disks, &$end);
        })+
    };
}

matrix! {
    pvh_small:            CLOUD_PVH   ACPI     1 cpus   64 MiB  0 disks DEFAULT;
    pvh:                  CLOUD_PVH   ACPI     2 cpus  512 MiB  1 disks REBOOT;
    pvh_large:            CLOUD_PVH   ACPI     8 cpus 5120 MiB  4 disks PANIC;
    pvh_most_disks:       CLOUD_PVH   ACPI     2 cpus  512 MiB 64 disks DEFAULT;
    pvh_many_cpus:        CLOUD_PVH   ACPI    16 cpus  512 MiB  0 disks SILENT_PANIC;
    linux64_small:        CLOUD_64    ACPI     2 cpus   64 MiB  4 disks DEBUG_EXIT;
    linux64_large:        CLOUD_64    ACPI     1 cpus 5120 MiB  1 disks DEFAULT;
    bzimage:              CLOUD_BZ    ACPI     1 cpus  512 MiB  4 disks SILENT_PANIC;
    bzimage_small:        CLOUD_BZ    ACPI     8 cpus   72 MiB  1 disks DEFAULT; // it asks for 68 MiB itself
    bzimage_large:        CLOUD_BZ    ACPI     2 cpus 5120 MiB  0 disks PANIC;
    amd64_pvh:            PLAIN_PVH   ACPI     2 cpus  512 MiB  1 disks DEFAULT;
    newer_pvh:            NEWER_PVH   ACPI     1 cpus  512 MiB  1 disks DEFAULT;
    newer_pvh_smp:        NEWER_PVH   ACPI     2 cpus  512 MiB  4 disks REBOOT;
    newer_pvh_many_cpus:  NEWER_PVH   ACPI     8 cpus  512 MiB  1 disks DEBUG_EXIT;
    newer_bzimage:        NEWER_BZ    ACPI     2 cpus 5120 MiB  1 disks SILENT_PANIC;
    no_acpi_pvh:          NO_ACPI_PVH NO_ACPI  1 cpus  512 MiB  1 disks DEFAULT;
    no_acpi_pvh_large:    NO_ACPI_PVH NO_ACPI  2 cpus 5120 MiB  4 disks SILENT_PANIC;
    no_acpi_many_disks:   NO_ACPI_PVH NO_ACPI  2 cpus  512 MiB 40 disks DEFAULT;
    no_acpi_linux64:      NO_ACPI_64  NO_ACPI  8 cpus  512 MiB  4 disks DEBUG_EXIT;
    no_acpi_bzimage:      NO_ACPI_BZ  NO_ACPI  2 cpus  512 MiB  0 disks REBOOT;
}

/// What every guest reports about its machine.
const FACTS: &str = r#"
fact cpus $(nproc)
fact cmdline $(cat /proc/cmdline)
fact clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
[ -d /sys/firmware/acpi ] && fact acpi on || fact acpi off
grep 'System RAM' /proc/iomem | while read -r range rest; do fact ram $range; done
for disk in /sys/block/vd*; do
    [ -e $disk ] || continue
    fact disk ${disk##*/} $(cat $disk/size)
    # Its first sector says which image it is.
    fact content ${disk##*/} $(head -c 8 /dev/${disk##*/})
done
dmesg -r | grep -e '^<[0-3]>' -e 'cut here' -e 'Unknown kernel command line' | while read -r line; do fact complaint $line; done
"#;

/// What Debian's kernels say on any machine like this one.
const HARMLESS: &[&str] = &[
    // There is none.
    "PCI: Fatal: No config space access function found",
];

fn boots(system: System, acpi: bool, cpus: u64, memory: u64, disks: usize, end: &End) {
    let End(last_words, status, says) = end;
    let acpi_option = if acpi { "on" } else { "off" };
    let mut guest = Guest::new(system, &format!("{FACTS}\n{last_words}")).with(&format!(
        "--cpus {cpus} --memory {memory}M --acpi {acpi_option} --cmdline user.word=1"
    ));
    if last_words.contains("outb 0xf4") {
        guest = guest.with("--debug-exit");
    }
    if memory < 80 {
        // The files of its trace events take 9 MiB, before Debian's kernel has given its start-up memory back.
        guest = guest.with("--cmdline initcall_blacklist=tracer_init_tracefs");
    }
    if disks > 0 {
        // The initrd would mount the first disk.
        guest = guest.with("--cmdline root=");
    }
    for index in 0..disks {
        let name = format!("image-{index}");
        guest = guest.with_disk(&name, size(index), "");
        write_at_start(&guest.path(&name), &name);
    }

    let report = guest.run(*status);
    assert_eq!(report.number("cpus"), cpus, "{}", report.ended);
    assert_eq!(report.get("acpi"), acpi_option);
    assert!(report.get("cmdline").starts_with("console=ttyS0 "), "{}", report.get("cmdline"));
    assert!(report.get("cmdline").contains(" user.word=1"), "{}", report.get("cmdline"));
    assert!(
        matches!(report.get("clocksource"), "kvm-clock" | "tsc"),
        "{}",
        report.get("clocksource")
    );
    check_ram(&report, memory << 20);
    let sorted = |facts: Vec<&str>| facts.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    let disk = |n| format!("{} {}", name(n), size(n) / 512);
    assert_eq!(sorted(report.all("disk")), (0..disks).map(disk).collect());
    let content = |n| format!("{} image-{n}", name(n));
    assert_eq!(sorted(report.all("content")), (0..disks).map(content).collect());
    let complaints = report.all("complaint");
    let complaints: Vec<_> = complaints
        .iter()
        .filter(|line| !HARMLESS.iter().any(|known| line.contains(known)))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    if says.is_empty() {
        assert_eq!(report.ended.errors, "");
    } else {
        assert!(
            report.ended.errors.contains(says) && report.ended.errors.lines().count() == 1,
            "{}",
            report.ended
        );
    }
}

/// Linux resets by a triple fault, or through the BIOS, if its user says so; without EFI, `e` leads to the BIOS.
#[test]
fn a_reboot_by_triple_fault_bios_or_efi_is_no_panic() {
    for method in ["t", "b", "e"] {
        let words = format!("--cmdline reboot={method}");
        let report = Guest::new(CLOUD_PVH, "settle; reboot -f").with(&words).run(0);
        assert_eq!(report.ended.errors, "", "{method}");
    }
}

/// The second kernel finds the machine as the first left it: the disk with its queues, the console, the interrupt controllers.
#[test]
fn a_kernel_started_by_kexec_finds_disk_and_console() {
    let script = "case $(cat /proc/cmdline) in
*second=1*) fact second $(nproc) $(od -An -tx1 -N 2 -j 1080 /dev/vda) ;;
*) cat /dev/vdb >/tmp/kernel && cat /dev/vdc >/tmp/initrd && settle
   kexec /tmp/kernel /tmp/initrd \"$(cat /proc/cmdline) second=1\"; fact failed $? ;;
esac";
    let guest = Guest::new(CLOUD_PVH, script).with_tools().with("--cpus 2 --memory 512M");
    for (name, file) in [("second", artefact(CLOUD_BZ.kernel)), ("archive", guest.path("initrd"))] {
        let mut content = std::fs::read(file).unwrap();
        content.resize(content.len().next_multiple_of(512), 0);
        std::fs::write(guest.path(name), content).unwrap();
    }
    let guest =
        guest.with("--disk second,format=raw,readonly=on --disk archive,format=raw,readonly=on");
    let report = guest.run(0);
    assert_eq!((report.get("second"), &*report.ended.errors), ("2 53 ef", ""));
}

/// Each disk has a size of its own.
fn size(index: usize) -> u64 {
    (index as u64 + 1) << 20
}

/// What Linux calls the disk: vda to vdz, then vdaa.
fn name(index: usize) -> String {
    let letter = |value: usize| char::from(b'a' + u8::try_from(value % 26).unwrap());
    let wraps = (index / 26).checked_sub(1).map(letter);
    "vd".chars().chain(wraps).chain([letter(index)]).collect()
}

fn write_at_start(image: &std::path::Path, text: &str) {
    use std::os::unix::fs::FileExt;
    std::fs::File::options()
        .write(true)
        .open(image)
        .unwrap()
        .write_all_at(text.as_bytes(), 0)
        .unwrap();
}

/// The kernel uses all RAM but what a PC keeps from it below 1 MiB, and none of it lies in the hole below 4 GiB.
fn check_ram(report: &Report, memory: u64) {
    let ranges: Vec<_> = report
        .all("ram")
        .into_iter()
        .map(|range| {
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            number(start)..number(end) + 1
        })
        .collect();
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    assert!(
        (memory - (1 << 20)..=memory).contains(&total),
        "{total:#x} of {memory:#x} bytes: {ranges:#x?}"
    );
    let hole = arch::layout::HOLE_START.0..arch::layout::HOLE_END.0;
    assert!(
        ranges.iter().all(|range| range.end <= hole.start || range.start >= hole.end),
        "{ranges:#x?}"
    );
}
