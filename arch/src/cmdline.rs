//! The kernel command line: the defaults for this machine, the words that its [`tables`] need, and the user's words. Later words override
//! earlier ones, so the user's come last.
//!
//! # How a panic differs from a reboot
//!
//! With `panic=-1` a panicking kernel restarts at once, by the same write to the reset register as an ordinary reboot.
//! `reboot=panic_warm` makes the two differ. It sets `panic_reboot_mode` (Linux 6.1 `kernel/reboot.c`, `reboot_setup`), which `panic()`
//! copies to `reboot_mode`. Every restart goes through `native_machine_emergency_restart` (`arch/x86/kernel/reboot.c`), which stores
//! 0x1234 at guest-physical 0x472 for a warm reboot and 0 for any other. `vmm` reads it after a reset
//! ([`crate::layout::WARM_RESET_FLAG`]). Kernels before 5.2 read the word as `reboot=p`, the reset port that this machine has anyway, and
//! their panic looks like a reboot.

use crate::machine_layout::MachineLayout;
use crate::tables;

/// Why a command line cannot be passed to the kernel. The kernel would silently cut off a line that is longer than its buffer, so minivmm
/// refuses it. `limit` does not count the NUL.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages name the variants and their fields")]
pub enum Error {
    #[error(
        "the kernel command line has byte {byte:#04x} at position {position}; only printable ASCII characters can be passed"
    )]
    Unprintable { byte: u8, position: usize },
    #[error(
        "the kernel command line has {length} bytes, and this kernel takes at most {limit}; shorten it, or with '--acpi off' give fewer disks"
    )]
    TooLong { length: usize, limit: usize },
}

/// How the kernel mounts `/dev/vda` as its root file system, unless the user's words name another root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Root {
    ReadWrite,
    ReadOnly,
}

/// Joins the defaults for a machine, whose first disk the kernel mounts as `root`, and the user's words.
///
/// A default is left out when the user names its key (the part before `=`). The user's words come last, since the kernel takes the last
/// word. `reboot=` adds up instead, so its default stays.
///
/// # Errors
/// [`Error::Unprintable`] for a byte that cannot be passed. [`crate::boot::plan`] checks the length, which depends on the kernel.
pub fn build(layout: &MachineLayout, root: Option<Root>, user: &str) -> Result<String, Error> {
    let spec = &layout.spec;
    check(user, usize::MAX)?;
    let user_keys = keys(user);
    let given = |key: &str| user_keys.iter().any(|given| given == key);
    let mut words: Vec<String> = Vec::new();
    let mut default = |key: &str, word: &str| {
        if !given(key) {
            words.push(word.to_owned());
        }
    };

    if spec.serial[0] {
        default("console", "console=ttyS0");
    }
    // The legacy probe touches four UARTs; each absent one costs its exits and leaves a dead /dev/ttyS.
    let uarts = spec.serial.iter().rposition(|present| *present).map_or(0, |last| last + 1);
    default("8250.nr_uarts", &format!("8250.nr_uarts={uarts}"));
    // No PCI bus: spares the early quirks' scan of bus 0, and on AMD the GART's, by port I/O (`early_pci_allowed`).
    default("pci", "pci=off");
    default("panic", "panic=-1");
    words.push("reboot=panic_warm".to_owned());
    words.extend(tables::words(layout));
    if let Some(root) = root
        && !given("root")
    {
        words.push("root=/dev/vda".to_owned());
        if !given("ro") && !given("rw") {
            words.push(if root == Root::ReadOnly { "ro" } else { "rw" }.to_owned());
        }
    }
    let user = user.trim_matches(' ');
    if !user.is_empty() {
        words.push(user.to_owned());
    }
    Ok(words.join(" "))
}

/// Checks that `cmdline` is printable ASCII of at most `limit` bytes.
pub(crate) fn check(cmdline: &str, limit: usize) -> Result<(), Error> {
    if let Some((position, byte)) =
        cmdline.bytes().enumerate().find(|(_, byte)| !matches!(byte, b' '..=b'~'))
    {
        return Err(Error::Unprintable { byte, position });
    }
    if cmdline.len() > limit {
        return Err(Error::TooLong { length: cmdline.len(), limit });
    }
    Ok(())
}

/// The keys of the kernel's words, as the kernel reads them (`lib/cmdline.c`, `next_arg`). Words end at a space outside double quotes. In
/// a key, `-` and `_` are the same. What follows `--` is for init.
fn keys(cmdline: &str) -> Vec<String> {
    let mut quoted = false;
    cmdline
        .split(|c| {
            quoted ^= c == '"';
            c == ' ' && !quoted
        })
        .take_while(|word| *word != "--")
        .filter(|word| !word.is_empty())
        .map(|word| {
            word.trim_start_matches('"').split('=').next().unwrap_or_default().replace('-', "_")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_layout::MachineSpec;

    const ACPI: MachineSpec =
        MachineSpec { memory: 1 << 30, cpus: 1, serial: [true, false], acpi: true, disks: 1 };

    fn built(spec: MachineSpec, root: Option<Root>, user: &str) -> Result<String, Error> {
        build(&MachineLayout::new(spec), root, user)
    }

    const COMMON: &str = "console=ttyS0 8250.nr_uarts=1 pci=off panic=-1 reboot=panic_warm";

    #[test]
    fn defaults_stand_alone() {
        assert_eq!(built(ACPI, None, "").unwrap(), COMMON);
        for (root, words) in [(Root::ReadWrite, "rw"), (Root::ReadOnly, "ro")] {
            let expected = format!("{COMMON} root=/dev/vda {words}");
            assert_eq!(built(ACPI, Some(root), " ").unwrap(), expected);
        }
        let silent = MachineSpec { serial: [false; 2], ..ACPI };
        assert_eq!(
            built(silent, None, "").unwrap(),
            "8250.nr_uarts=0 pci=off panic=-1 reboot=panic_warm"
        );
        for (serial, words) in [([true; 2], "console=ttyS0 "), ([false, true], "")] {
            assert_eq!(
                built(MachineSpec { serial, ..ACPI }, None, "").unwrap(),
                format!("{words}8250.nr_uarts=2 pci=off panic=-1 reboot=panic_warm")
            );
        }
    }

    #[test]
    fn the_users_words_come_last_and_win() {
        let built = |user| built(ACPI, Some(Root::ReadWrite), user).unwrap();
        assert_eq!(built("quiet"), format!("{COMMON} root=/dev/vda rw quiet"));
        assert_eq!(built("ro"), format!("{COMMON} root=/dev/vda ro"));
        assert_eq!(built("root=LABEL=x"), format!("{COMMON} root=LABEL=x"));
        assert_eq!(
            built("console=hvc0 panic=5"),
            "8250.nr_uarts=1 pci=off reboot=panic_warm root=/dev/vda rw console=hvc0 panic=5"
        );
        assert_eq!(
            built("8250.nr-uarts=4"),
            built("").replace(" 8250.nr_uarts=1", "") + " 8250.nr-uarts=4"
        );
        // `reboot=` adds up in the kernel: the user's `t` chooses how to reset, and the default still marks a panic.
        assert_eq!(built("reboot=t"), format!("{COMMON} root=/dev/vda rw reboot=t"));
    }

    #[test]
    fn words_for_init_and_inside_quotes_are_not_the_kernels() {
        let built = |user| built(ACPI, Some(Root::ReadWrite), user).unwrap();
        for user in
            ["-- root=/dev/vdb", r#"dyndbg="file a.c root=x +p""#, "rootwait", "rootfstype=ext4"]
        {
            assert_eq!(built(user), format!("{COMMON} root=/dev/vda rw {user}"));
        }
        assert_eq!(built(r#""root=/dev/vdb""#), format!(r#"{COMMON} "root=/dev/vdb""#));
    }

    #[test]
    fn without_acpi_the_command_line_names_the_devices() {
        let machine = MachineSpec { acpi: false, disks: 2, ..ACPI };
        assert_eq!(
            built(machine, Some(Root::ReadWrite), "virtio_mmio.device=4K@0xe0000000:3").unwrap(),
            format!(
                "{COMMON} acpi=off reboot=k no_timer_check initcall_blacklist=add_rtc_cmos \
                 virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:17 root=/dev/vda rw \
                 virtio_mmio.device=4K@0xe0000000:3"
            )
        );
    }

    #[test]
    fn bad_bytes_and_lengths_are_refused() {
        for (text, byte, position) in
            [("a\0b", 0, 1), ("quiet\n", b'\n', 5), ("\tx", b'\t', 0), ("é", 0xc3, 0)]
        {
            assert_eq!(built(ACPI, None, text), Err(Error::Unprintable { byte, position }));
        }
        assert_eq!(check("12345", 5), Ok(()));
        assert_eq!(check("123456", 5), Err(Error::TooLong { length: 6, limit: 5 }));
    }
}
