//! The kernel command line: our defaults, then the virtio-mmio devices, then the user's words, which win.
//!
//! # How a panic is told from a reboot
//!
//! With `panic=-1` a panicking kernel restarts at once, by the same write to the reset register as an ordinary reboot.
//! `reboot=panic_warm` makes the two differ: `panic()` (Linux 6.1 `kernel/panic.c`) copies `panic_reboot_mode`, which
//! that word sets (`kernel/reboot.c`, `reboot_setup`), to `reboot_mode`; and `native_machine_emergency_restart`
//! (`arch/x86/kernel/reboot.c`), which every restart goes through, stores 0x1234 at guest-physical 0x472 for a warm
//! reboot and 0 for any other. [`panicked`] reads it. Kernels before 5.2 do not know the word (they read it as
//! `reboot=p`: the reset port that this machine has anyway), and their panic looks like a reboot.

use vm_memory::Bytes;

use crate::GuestMemory;
use crate::layout::{self, MmioDevice};

/// Why a command line cannot be passed on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A byte that a kernel command line cannot hold.
    #[error(
        "the kernel command line has byte {byte:#04x} at position {position}; only printable ASCII characters can be passed"
    )]
    Unprintable {
        /// The byte.
        byte: u8,
        /// Its offset from the start.
        position: usize,
    },
    /// More bytes than the kernel keeps.
    #[error("the kernel command line has {length} bytes, and this kernel takes at most {limit}; shorten it")]
    TooLong {
        /// Bytes it has.
        length: usize,
        /// Bytes the kernel keeps, without the NUL.
        limit: usize,
    },
}

/// The disk that the kernel mounts as `/` unless the user says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// `/dev/vda`, writable.
    ReadWrite,
    /// `/dev/vda`, which refuses writes.
    ReadOnly,
}

/// What the defaults depend on.
#[derive(Clone, Copy, Debug)]
pub struct Defaults<'a> {
    /// There is a COM1.
    pub serial: bool,
    /// The first disk, if there is one.
    pub root: Option<Root>,
    /// ACPI describes the machine; if not, an MPTable does, and these words do.
    pub acpi: bool,
    /// The virtio-mmio devices, in order. Only named here without ACPI.
    pub virtio_mmio: &'a [MmioDevice],
}

/// Joins the defaults for a machine and the user's words.
///
/// A default gives way when the user names its key (the part before `=`), and the user's words come last, since the
/// kernel lets the last word win. `reboot=` adds up instead of replacing, so its default stays.
///
/// # Errors
/// [`Error::Unprintable`] for a byte that cannot be passed on. The length is [`crate::boot::load`]'s to check: it
/// depends on the kernel.
pub fn build(machine: &Defaults<'_>, user: &str) -> Result<String, Error> {
    check(user, usize::MAX)?;
    let user_keys = keys(user);
    let given = |key: &str| user_keys.iter().any(|given| given == key);
    let mut words: Vec<String> = Vec::new();
    let mut default = |key: &str, word: &str| {
        if !given(key) {
            words.push(word.to_owned());
        }
    };

    if machine.serial {
        default("console", "console=ttyS0");
    }
    // The legacy probe touches four UARTs; each absent one costs its exits and leaves a dead /dev/ttyS.
    default("8250.nr_uarts", if machine.serial { "8250.nr_uarts=1" } else { "8250.nr_uarts=0" });
    // No PCI bus: spares the early quirks' scan of bus 0, and on AMD the GART's, by port I/O (`early_pci_allowed`).
    default("pci", "pci=off");
    default("panic", "panic=-1");
    words.push("reboot=panic_warm".to_owned());
    if !machine.acpi {
        // Says what is so; without it the kernel looks for tables and complains.
        words.push("acpi=off".to_owned());
        // The only way left to reset that needs no guessing: the i8042.
        words.push("reboot=k".to_owned());
        // With an MPTable the kernel tries the 8254's interrupt for ten ticks, and gives up (panics) where the host is
        // too busy to deliver them in time. Kernels with KVM_GUEST skip this by themselves. With ACPI there is no 8254.
        words.push("no_timer_check".to_owned());
        // There is no clock chip, and only ACPI can say so. Without this Linux makes a device for one, and its driver
        // waits for the chip for seconds (`arch/x86/kernel/rtc.c`; `drivers/rtc/rtc-mc146818-lib.c`).
        words.push("initcall_blacklist=add_rtc_cmos".to_owned());
    }
    if let Some(root) = machine.root
        && !given("root")
    {
        words.push("root=/dev/vda".to_owned());
        if !given("ro") && !given("rw") {
            words.push(if root == Root::ReadOnly { "ro" } else { "rw" }.to_owned());
        }
    }
    if !machine.acpi {
        // Documentation/admin-guide/kernel-parameters.txt: <size>@<baseaddr>:<irq>
        words.extend(
            machine.virtio_mmio.iter().map(|MmioDevice { base, size, gsi }| {
                format!("virtio_mmio.device={}K@{:#x}:{gsi}", size / 1024, base.0)
            }),
        );
    }
    let user = user.trim_matches(' ');
    if !user.is_empty() {
        words.push(user.to_owned());
    }
    Ok(words.join(" "))
}

/// Checks that `cmdline` is printable ASCII of at most `limit` bytes.
pub(crate) fn check(cmdline: &str, limit: usize) -> Result<(), Error> {
    if let Some((position, byte)) = cmdline.bytes().enumerate().find(|(_, byte)| !matches!(byte, b' '..=b'~')) {
        return Err(Error::Unprintable { byte, position });
    }
    if cmdline.len() > limit {
        return Err(Error::TooLong { length: cmdline.len(), limit });
    }
    Ok(())
}

/// Whether the kernel that just reset the machine did so out of `panic()`: see the module's text.
///
/// Only meaningful at a reset, and only for a kernel that was given the default `reboot=`.
pub fn panicked(memory: &GuestMemory) -> bool {
    memory.read_obj(layout::WARM_RESET_FLAG).is_ok_and(|flag: u16| flag == layout::WARM_RESET_MAGIC)
}

/// The keys of the kernel's words, as the kernel reads them (`lib/cmdline.c`, `next_arg`): words end at a space outside
/// double quotes, `-` and `_` are the same in a key, and what follows `--` is for init.
fn keys(cmdline: &str) -> Vec<String> {
    let mut quoted = false;
    cmdline
        .split(|c| {
            quoted ^= c == '"';
            c == ' ' && !quoted
        })
        .take_while(|word| *word != "--")
        .filter(|word| !word.is_empty())
        .map(|word| word.trim_start_matches('"').split('=').next().unwrap_or_default().replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    const ACPI: Defaults<'_> = Defaults { serial: true, root: None, acpi: true, virtio_mmio: &[] };
    const COMMON: &str = "console=ttyS0 8250.nr_uarts=1 pci=off panic=-1 reboot=panic_warm";

    #[test]
    fn defaults_stand_alone() {
        assert_eq!(build(&ACPI, "").unwrap(), COMMON);
        let with_disk = Defaults { root: Some(Root::ReadWrite), ..ACPI };
        assert_eq!(build(&with_disk, " ").unwrap(), format!("{COMMON} root=/dev/vda rw"));
        let read_only = Defaults { root: Some(Root::ReadOnly), ..ACPI };
        assert_eq!(build(&read_only, "").unwrap(), format!("{COMMON} root=/dev/vda ro"));
        let silent = Defaults { serial: false, ..ACPI };
        assert_eq!(build(&silent, "").unwrap(), "8250.nr_uarts=0 pci=off panic=-1 reboot=panic_warm");
    }

    #[test]
    fn the_users_words_come_last_and_win() {
        let machine = Defaults { root: Some(Root::ReadWrite), ..ACPI };
        let built = |user| build(&machine, user).unwrap();
        assert_eq!(built("quiet"), format!("{COMMON} root=/dev/vda rw quiet"));
        assert_eq!(built("ro"), format!("{COMMON} root=/dev/vda ro"));
        assert_eq!(built("root=LABEL=x"), format!("{COMMON} root=LABEL=x"));
        assert_eq!(
            built("console=hvc0 panic=5"),
            "8250.nr_uarts=1 pci=off reboot=panic_warm root=/dev/vda rw console=hvc0 panic=5"
        );
        assert_eq!(built("8250.nr-uarts=4"), built("").replace(" 8250.nr_uarts=1", "") + " 8250.nr-uarts=4");
        // `reboot=` adds up in the kernel: the user's `t` picks the way, ours still marks a panic.
        assert_eq!(built("reboot=t"), format!("{COMMON} root=/dev/vda rw reboot=t"));
    }

    #[test]
    fn words_for_init_and_inside_quotes_are_not_the_kernels() {
        let machine = Defaults { root: Some(Root::ReadWrite), ..ACPI };
        for user in ["-- root=/dev/vdb", r#"dyndbg="file a.c root=x +p""#, "rootwait", "rootfstype=ext4"] {
            assert_eq!(build(&machine, user).unwrap(), format!("{COMMON} root=/dev/vda rw {user}"));
        }
        assert_eq!(build(&machine, r#""root=/dev/vdb""#).unwrap(), format!(r#"{COMMON} "root=/dev/vdb""#));
    }

    #[test]
    fn without_acpi_the_command_line_names_the_devices() {
        let devices = [layout::virtio_mmio(0).unwrap(), layout::virtio_mmio(8).unwrap()];
        let machine = Defaults { acpi: false, root: Some(Root::ReadWrite), virtio_mmio: &devices, ..ACPI };
        assert_eq!(
            build(&machine, "virtio_mmio.device=4K@0xe0000000:3").unwrap(),
            format!(
                "{COMMON} acpi=off reboot=k no_timer_check initcall_blacklist=add_rtc_cmos root=/dev/vda rw \
                 virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0008000:5 virtio_mmio.device=4K@0xe0000000:3"
            )
        );
    }

    #[test]
    fn bad_bytes_and_lengths_are_refused() {
        for (text, byte, position) in [("a\0b", 0, 1), ("quiet\n", b'\n', 5), ("\tx", b'\t', 0), ("é", 0xc3, 0)] {
            assert_eq!(build(&ACPI, text), Err(Error::Unprintable { byte, position }));
        }
        assert_eq!(check("12345", 5), Ok(()));
        assert_eq!(check("123456", 5), Err(Error::TooLong { length: 6, limit: 5 }));
    }

    #[test]
    fn a_panic_is_told_by_the_warm_reset_flag() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(!panicked(&memory));
        memory.write_obj(0x1234u16, GuestAddress(0x472)).unwrap();
        assert!(panicked(&memory));
    }
}
