//! The structure that `ARCHITECTURE.md` promises, checked against the source: who may import whom, how large the core,
//! its files and its functions may become, and the language of comments and messages.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod calls;
mod documents;
mod imports;
mod kvm_page;
mod language;
mod size;
mod source;

use std::collections::BTreeSet;

/// Parts that the two walks (a kernel boots, a write reaches the file) do not pass, with the files that make them up.
/// Core files import none of them, except for the files in `PLUGS`.
const CAPABILITIES: &[(&str, &[&str])] = &[
    ("ACPI", &["arch/src/tables/acpi.rs"]),
    ("affinity", &["vmm/src/affinity.rs"]),
    ("binary's pages", &["vmm/src/binary_pages.rs"]),
    ("block devices", &["devices/src/disk/block_device.rs"]),
    ("bzImage", &["arch/src/boot/bzimage.rs"]),
    ("saved machines: words", &["cli/src/saved.rs", "cli/src/arguments/incoming.rs"]),
    ("command line", &["cli/src"]),
    ("character devices", &["vmm/src/chardev.rs"]),
    ("chapters", &["devices/src/chapters.rs", "vmm/src/chapters.rs"]),
    ("console arguments", &["cli/src/arguments/consoles.rs"]),
    (
        "console input",
        &[
            "devices/src/legacy/serial/input.rs",
            "vmm/src/console/ends.rs",
            "vmm/src/console/escape.rs",
            "vmm/src/console/input.rs",
            "vmm/src/console/serial_console.rs",
        ],
    ),
    ("consoles beside stdio", &["vmm/src/console/backends.rs", "vmm/src/console/ports.rs"]),
    ("changes of what is polled", &["vmm/src/sources/changes.rs"]),
    (
        "save: file and memory",
        &[
            "vmm/src/snapshot/core_file.rs",
            "vmm/src/snapshot/new_file.rs",
            "vmm/src/snapshot/page_map.rs",
            "vmm/src/snapshot/pages.rs",
        ],
    ),
    ("save: increments", &["vmm/src/snapshot/increments.rs", "vmm/src/snapshot/page_set.rs"]),
    ("save: in the background", &["vmm/src/snapshot/background_save.rs"]),
    ("restore", &["vmm/src/snapshot/description.rs", "vmm/src/snapshot/incoming.rs"]),
    ("save and restore", &["vmm/src/snapshot", "vmm/src/machine/save_task.rs"]),
    ("save in QMP", &["vmm/src/control/deferred.rs", "vmm/src/control/migration.rs"]),
    (
        "disk keys",
        &[
            "devices/src/disk/option_words.rs",
            "cli/src/arguments/disk.rs",
            "cli/src/arguments/throttling.rs",
        ],
    ),
    ("schema of QMP", &["vmm/src/control/schema.rs"]),
    ("disks in QMP", &["vmm/src/control/disk_commands.rs", "vmm/src/control/metrics.rs"]),
    ("control (QMP)", &["vmm/src/control"]),
    ("ctl", &["cli/src/ctl"]),
    ("CPUs of their own", &["vmm/src/affinity/cpu_pm.rs"]),
    ("debug exit", &["devices/src/legacy/debug_exit.rs"]),
    ("detected zeroes", &["devices/src/disk/detect_zeroes.rs"]),
    ("direct I/O", &["devices/src/disk/bounce.rs", "devices/src/disk/direct.rs"]),
    ("directory disks", &["cli/src/directory_disk.rs"]),
    (
        "injected faults",
        &[
            "devices/src/disk/injected_faults",
            "vmm/src/control/fault_commands.rs",
            "vmm/src/disk_faults.rs",
        ],
    ),
    ("errors as text", &["vmm/src/error/report.rs"]),
    ("error policies", &["devices/src/block/error_policy.rs"]),
    ("event devices", &["arch/src/tables/events.rs"]),
    ("exec", &["vmm/src/exec"]),
    ("exits, shown", &["vmm/src/vcpu/exits/report.rs"]),
    ("explain", &["vmm/src/explain", "devices/src/virtio/spec/names.rs"]),
    ("gdb", &["vmm/src/gdb"]),
    ("first bytes of files", &["arch/src/boot/signatures.rs", "vmm/src/boot_image/describe.rs"]),
    ("geometry", &["devices/src/block/geometry.rs"]),
    (
        "halt watch",
        &["vmm/src/halt_watch.rs", "vmm/src/machine/halt_report.rs", "vmm/src/vcpu/halt.rs"],
    ),
    ("host's CPU", &["vmm/src/host_cpu.rs"]),
    ("huge pages", &["vmm/src/hugepages.rs"]),
    ("io_uring", &["devices/src/disk/engine/uring.rs"]),
    ("image locks", &["devices/src/disk/image_file.rs", "devices/src/disk/lock.rs"]),
    ("kernel pages", &["vmm/src/kernel_pages.rs", "vmm/src/machine/kernel_file.rs"]),
    ("layers over disks", &["devices/src/disk/layer.rs"]),
    ("log of writes", &["devices/src/disk/log_writes", "vmm/src/write_logs.rs"]),
    ("MPTable", &["arch/src/tables/mptable.rs"]),
    ("option checks", &["devices/src/block/option_checks.rs"]),
    ("other formats", &["devices/src/disk/other_formats.rs"]),
    (
        "operator's view of a disk",
        &["devices/src/block/histogram.rs", "devices/src/block/operator.rs"],
    ),
    ("output files", &["vmm/src/output_files.rs"]),
    ("panic port", &["devices/src/legacy/pvpanic.rs"]),
    ("panics", &["vmm/src/snapshot/panic_dump.rs"]),
    (
        "power and reset",
        &["devices/src/legacy/i8042.rs", "devices/src/legacy/power.rs", "vmm/src/attach/legacy.rs"],
    ),
    ("power cuts", &["cli/src/powercut"]),
    (
        "power cuts: states",
        &[
            "cli/src/powercut/choice.rs",
            "cli/src/powercut/history.rs",
            "cli/src/powercut/medium.rs",
            "cli/src/powercut/plan.rs",
        ],
    ),
    ("qcow2", &["devices/src/disk/qcow2"]),
    (
        "qcow2: order of metadata",
        &[
            "devices/src/disk/qcow2/metadata.rs",
            "devices/src/disk/qcow2/ordered.rs",
            "devices/src/disk/qcow2/publish.rs",
        ],
    ),
    ("register pages", &["vmm/src/register_pages.rs"]),
    ("refused images", &["devices/src/disk/open_reason.rs"]),
    ("refused command lines", &["cli/src/arguments/usage_error.rs"]),
    ("replay", &["cli/src/replay"]),
    (
        "reset",
        &[
            "arch/src/cpu/changeable_msrs.rs",
            "devices/src/bus/reset.rs",
            "vmm/src/irq_chips.rs",
            "vmm/src/machine/reset.rs",
            "vmm/src/memory/clear.rs",
            "vmm/src/vcpu/state.rs",
        ],
    ),
    ("ranges of raw images", &["devices/src/disk/raw/ranges.rs"]),
    ("reports of guest and disks", &["vmm/src/machine/reports.rs"]),
    ("resize", &["vmm/src/machine/resize.rs"]),
    ("resets of disks", &["devices/src/block/worker/reset.rs"]),
    ("required calls", &["cli/src/required_calls.rs"]),
    ("sandbox", &["vmm/src/sandbox"]),
    ("scsi", &["devices/src/disk/scsi", "devices/src/block/scsi"]),
    (
        "segments and identity",
        &[
            "devices/src/block/request/identity.rs",
            "devices/src/block/request/segments.rs",
            "devices/src/virtio/queue/chain/ranges.rs",
            "devices/src/virtio/spec/blk/optional.rs",
        ],
    ),
    ("service manager", &["cli/src/service.rs"]),
    ("signals", &["vmm/src/machine/hurry.rs", "vmm/src/signals.rs"]),
    (
        "state",
        &[
            "devices/src/block/worker/state.rs",
            "devices/src/legacy/serial/state.rs",
            "devices/src/virtio/mmio/state.rs",
            "devices/src/virtio/queue/split/state.rs",
        ],
    ),
    ("temporary files", &["devices/src/disk/temporary_file.rs"]),
    (
        "threads that wait for the host",
        &[
            "devices/src/disk/engine/threads.rs",
            "devices/src/disk/execute.rs",
            "devices/src/disk/job/copy.rs",
            "devices/src/disk/raw/blocking.rs",
        ],
    ),
    ("threads' memory", &["vmm/src/thread_memory.rs"]),
    ("throttling", &["devices/src/block/throttle"]),
    ("timeout", &["vmm/src/timeout.rs"]),
    (
        "trace",
        &[
            "cli/src/trace",
            "cli/src/arguments/trace.rs",
            "vmm/src/trace",
            "vmm/src/control/trace_commands.rs",
        ],
    ),
    ("trace view", &["cli/src/trace_view", "cli/src/svg.rs", "cli/src/explain_view.rs"]),
    (
        "VM generation ID",
        &["arch/src/tables/generation_id.rs", "vmm/src/snapshot/generation_id.rs"],
    ),
    ("Unix sockets", &["vmm/src/listener.rs"]),
];

/// Where capabilities are plugged in: builders, and the files that name every backend.
const PLUGS: &[&str] = &[
    "arch/src/boot/formats.rs",
    "arch/src/tables/mod.rs",
    "vmm/src/attach.rs",
    "vmm/src/builder.rs",
    "vmm/src/console/open.rs",
    "vmm/src/lib.rs",
    "devices/src/disk/opened.rs",
    "devices/src/disk/open.rs",
    "devices/src/block/device.rs",
    "devices/src/block/options.rs",
    "cli/src/main.rs",
    "cli/src/arguments/disk.rs",
];

/// The capability that a file belongs to: the one with the longest path that leads to it.
fn capability(path: &str) -> Option<&'static str> {
    let prefixes =
        CAPABILITIES.iter().flat_map(|(name, paths)| paths.iter().map(move |at| (at, name)));
    let belongs = prefixes.filter(|(prefix, _)| path.starts_with(**prefix));
    belongs.max_by_key(|(prefix, _)| prefix.len()).map(|(_, name)| *name)
}

#[test]
fn no_core_file_imports_a_capability() {
    let imports = imports::resolve(&source::files());
    let mut wrong = Vec::new();
    for (file, used) in &imports {
        for other in used {
            if capability(file).is_none()
                && !PLUGS.contains(&file.as_str())
                && let Some(name) = capability(other)
            {
                wrong.push(format!("{file} imports {other} ({name})"));
            }
        }
    }
    assert!(wrong.is_empty(), "the core imports capabilities:\n{}", wrong.join("\n"));
}

/// A capability may add methods to a type of the core, for its own use: a call of one is an import that no path shows.
#[test]
fn no_core_file_calls_a_method_that_a_capability_adds_to_a_core_type() {
    let files = source::files();
    let (core, rooms): (Vec<_>, Vec<_>) =
        files.iter().partition(|file| capability(&file.path).is_none());
    let of_core: BTreeSet<_> = core.iter().flat_map(|file| calls::methods(file)).collect();
    let mut wrong = Vec::new();
    for room in rooms {
        let added: BTreeSet<_> = calls::added_methods(room).difference(&of_core).cloned().collect();
        for file in core.iter().filter(|file| !PLUGS.contains(&file.path.as_str())) {
            let called: Vec<_> = calls::called(file).intersection(&added).cloned().collect();
            if !called.is_empty() {
                wrong.push(format!("{} calls {called:?} of {}", file.path, room.path));
            }
        }
    }
    assert!(wrong.is_empty(), "the core calls capabilities:\n{}", wrong.join("\n"));
}

#[test]
fn crates_depend_in_one_direction() {
    let allowed = |from: &str, to: &str| match from {
        "cli" => ["vmm", "devices"].contains(&to),
        "vmm" => ["arch", "devices"].contains(&to),
        _ => false,
    };
    let krate = |path: &str| path.split('/').next().unwrap_or_default().to_owned();
    for (file, used) in imports::resolve(&source::files()) {
        for other in used {
            let (from, to) = (krate(&file), krate(&other));
            assert!(from == to || allowed(&from, &to), "{file} imports {other}");
        }
    }
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let imports = imports::resolve(&source::files());
    let circles = imports::circles(&imports);
    let mut report = String::new();
    for circle in &circles {
        report += "\na circle:\n";
        for file in circle {
            let inside: Vec<_> = imports[file].iter().filter(|to| circle.contains(to)).collect();
            report += &format!("  {file} -> {inside:?}\n");
        }
    }
    assert!(circles.is_empty(), "{report}");
}

/// Functions that compute guest-physical addresses, with the only files that may use them. All others get the results, in
/// a `MachineLayout` or a `Plan`.
const ADDRESS_FUNCTIONS: &[(&str, &[&str])] = &[
    ("MachineLayout::new", &["vmm/src/builder.rs"]),
    // A saved machine's ranges of RAM are checked before there is a machine.
    ("ram_ranges", &["arch/src/machine_layout.rs", "vmm/src/snapshot/description.rs"]),
    ("e820", &["arch/src/machine_layout.rs"]),
    ("virtio_mmio_device", &["arch/src/machine_layout.rs"]),
    ("boot::plan", &["vmm/src/boot_image.rs"]),
    ("low_end", &["arch/src/boot/mod.rs"]),
    ("place_initrd", &["arch/src/boot/mod.rs"]),
];

#[test]
fn each_guest_physical_address_is_computed_in_one_place() {
    let (mut found, mut wrong) = (BTreeSet::new(), Vec::new());
    for file in source::files() {
        let named = calls::named(&file);
        for (function, users) in ADDRESS_FUNCTIONS {
            if named.contains(*function) {
                found.insert(*function);
                if !users.contains(&file.path.as_str()) {
                    wrong.push(format!("{} uses {function}", file.path));
                }
            }
        }
        if file.path != "arch/src/layout.rs" {
            let literals = calls::literal_addresses(&file);
            wrong.extend(literals.iter().map(|number| format!("{}: {number}", file.path)));
        }
    }
    assert!(wrong.is_empty(), "addresses from a second source:\n{}", wrong.join("\n"));
    assert_eq!(found.len(), ADDRESS_FUNCTIONS.len(), "only {found:?} are used");
}
