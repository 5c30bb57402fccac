//! The small guests: freestanding programs that poll, for any /dev/kvm, even one that delivers no interrupts.
//!
//! `guest.s` has them all; [`Program`] names their entry points, and [`crate::image`] wraps them into kernel images.
#![expect(
    unsafe_code,
    reason = "the programs are assembled into this executable, and copied out from between two labels"
)]

use std::slice;

use arch::layout;

/// Where the image has to be loaded, guest-physical.
pub const BASE: u64 = layout::HIGH_MEMORY.0;

/// The exit status by which a program says that all went well; others are steps named in `guest.s`.
pub const SUCCESS: i32 = 42;
/// Exit status of [`Program::Nested`] on a processor without SVM.
pub const NO_SVM: i32 = 43;

/// Names the programs, and puts a table of their entry points (32 bits each) in front of them.
macro_rules! programs {
    ($($(#[$doc:meta])* $name:ident = $label:literal,)+) => {
        /// A small guest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Program {
            $($(#[$doc])* $name,)+
        }

        core::arch::global_asm!(
            ".pushsection .rodata.minivmm_guests, \"a\", @progbits",
            ".set DEBUG_EXIT, {debug_exit}",
            ".set COM1, {com1}",
            ".set COM2, {com2}",
            ".set PVPANIC, {pvpanic}",
            ".set SLEEP_CONTROL, {sleep_control}",
            ".set SLEEP_CONTROL_S5, {sleep_control_s5}",
            ".set RESET, {reset}",
            ".set RESET_VALUE, {reset_value}",
            ".set RESET_VECTOR, {reset_vector}",
            ".set WARM_RESET_FLAG, {warm_reset_flag}",
            ".set PAGE_TABLES, {page_tables}",
            ".set I8042_COMMAND, {i8042_command}",
            ".set VIRTIO, {virtio}",
            ".set COUNT_LOW, {count_low}",
            ".set COUNT_HIGH, {count_high}",
            ".globl guest_start",
            ".globl guest_end",
            "guest_start:",
            $(concat!(".long guest_", $label, " - guest_start"),)+
            include_str!("guest.s"),
            include_str!("chaos.s"),
            include_str!("crowd.s"),
            "guest_virtqueue:",
            include_str!("ten_lines/virtqueue.s"),
            "guest_end:",
            ".code64",
            ".popsection",
            debug_exit = const layout::DEBUG_EXIT,
            com1 = const layout::COM1,
            com2 = const layout::SERIAL_PORTS[1].0,
            pvpanic = const layout::PVPANIC,
            sleep_control = const layout::SLEEP_CONTROL,
            sleep_control_s5 = const layout::SLEEP_CONTROL_S5,
            reset = const layout::RESET,
            reset_value = const layout::RESET_VALUE,
            reset_vector = const layout::RESET_VECTOR.0,
            warm_reset_flag = const layout::WARM_RESET_FLAG.0,
            i8042_command = const layout::I8042_COMMAND,
            page_tables = const layout::PAGE_TABLES.0,
            virtio = const layout::VIRTIO_MMIO.0,
            count_low = const COUNTERS[0],
            count_high = const COUNTERS[1],
            options(att_syntax),
        );
    };
}

programs! {
    /// Powers off by ACPI's sleep register.
    PowerOff = "poweroff",
    /// Resets by ACPI's reset register.
    Reset = "reset",
    /// Resets by the keyboard controller.
    ResetI8042 = "reset_i8042",
    /// Reports a panic at the pvpanic port.
    Panic = "panic",
    /// Reports a panic at the pvpanic port, then as [`Program::DiskLoad`].
    PanicLoad = "panic_load",
    /// Ends in a triple fault.
    TripleFault = "triple_fault",
    /// Reboots by a triple fault, as Linux does with `reboot=t`.
    RebootTripleFault = "reboot_triple_fault",
    /// Reboots by the BIOS's reset vector, as Linux does with `reboot=b`.
    RebootBios = "reboot_bios",
    /// Sends an INIT to its own vCPU, which puts a PC's processor to where the firmware starts.
    Init = "init",
    /// Halts for good.
    Halt = "halt",
    /// Runs a guest of its own, which is [`Program::Echo`]. Without SVM it ends with [`NO_SVM`].
    Nested = "nested",
    /// Writes [`SUCCESS`] to the debug-exit port, and waits if that has no effect.
    Exit = "exit",
    /// Runs for ever.
    Spin = "spin",
    /// Prints "ready" and a newline, then what is typed; ends at `^D` with [`SUCCESS`].
    Echo = "echo",
    /// Prints "early" and a newline, reports a loaded crash kernel at the pvpanic port, then as [`Program::Echo`].
    EarlyEcho = "early_echo",
    /// Prints [`CHATTER`] 1024 times, then ends with [`SUCCESS`].
    Chatter = "chatter",
    /// For the PVH entry: prints the command line, "RSD PTR " or "-", and the initrd, each on a line; powers off.
    BootPvh = "boot_pvh",
    /// The same for the 64-bit Linux entry.
    BootLinux64 = "boot_linux64",
    /// For the 64-bit Linux entry and a debugger: see [`debugger`].
    Debugged = "debugged",
    /// Sends an NMI to all vCPUs, which it has not started; ends with [`SUCCESS`].
    Wake = "wake",
    /// Accesses ports and addresses where nothing is; ends with [`SUCCESS`].
    Unmapped = "unmapped",
    /// Drives a disk of [`DISK_SECTORS`] sectors: see the test. Prints its serial number; ends with [`SUCCESS`].
    Disk = "disk",
    /// Writes [`words`] from the address of its registers up to the first sector of each disk; ends with [`SUCCESS`].
    Disks = "disks",
    /// Prints the start of the first disk: the chapter *Ten-line guests* explains it.
    Virtqueue = "virtqueue",
    /// Fills the disk sector by sector with 32-bit words that count up from the sector's number, a dot for each finished write; ends with
    /// [`SUCCESS`] at the end of the disk.
    DiskLoad = "disk_load",
    /// As [`Program::DiskLoad`], with a flush after each write: a dot means that the sector is durable.
    DiskSync = "disk_sync",
    /// Checks that it finds the machine as at power-on and leaves it different; prints "ready" and a newline, then as
    /// [`Program::DiskLoad`].
    Reborn = "reborn",
    /// Posts 256 reads of 4080 MiB each on a disk of at least that size, prints "ready" and a newline, and spins.
    Flood = "flood",
    /// Drives a disk, kicks an empty queue 64 times and resets the disk, again and again; a dot for each round.
    ResetStorm = "reset_storm",
    /// Writes anything to the registers, rings and ports, then is an honest driver for a moment, again and again; a dot for each
    /// round.
    Chaos = "chaos",
    /// Prints "second" and a newline on the second serial port, then as [`Program::Echo`].
    SecondPort = "second_port",
    /// Does what `--exec`'s script does with a command that prints all byte values [`JOB_ROUNDS`] times, and has status 7.
    Job = "job",
    /// Writes to each page of 128 MiB, then prints lines of a dot without end. After a typed byte, writes to each page of 16 of these
    /// MiB again, and prints a line of a plus.
    Fill = "fill",
    /// Counts at both [`COUNTERS`], one after the other, and prints a dot now and then.
    Count = "count",
    /// As [`Program::Flood`], then resets the disk and prints "reset" and a newline when Status reads 0.
    FloodReset = "flood_reset",
    /// Prints "ready" and a newline; gives a write to the disk after a typed byte; after a second one starts the other vCPUs, of
    /// which as many as that byte says and the first one reset the disk. Prints "all here" and a newline before its own
    /// reset, and "reset" and a newline when Status reads 0.
    Crowd = "crowd",
    /// For two vCPUs and two disks: [`Program::Chaos`] at the first disk, and an honest driver of the second that writes, reads and
    /// compares; a dot on the second serial port for each sector.
    BesideChaos = "beside_chaos",
}

/// Addresses of [`Program::Debugged`], which counts at [`COUNTER`](debugger::COUNTER) until there is an exit status at
/// [`STATUS`](debugger::STATUS).
pub mod debugger {
    /// From the program's entry to its loop, whose first instruction counts.
    pub const LOOP: u64 = 0x100;
    /// From the loop to its second instruction.
    pub const SECOND_INSTRUCTION: u64 = 8;
    /// 32 bits: the rounds that have begun.
    pub const COUNTER: u64 = 0x22_0000;
    /// 32 bits: an exit status ends the program.
    pub const STATUS: u64 = 0x22_0008;
    /// 32 bits: how many of its own breakpoints the program has been given.
    pub const TRAPS: u64 = 0x22_0010;
    /// 32 bits: not 0 for a breakpoint of its own in each round. Not every KVM without hardware executes it.
    pub const BREAKS: u64 = 0x22_0018;
    /// Where the first 2 MiB of memory are mapped a second time, from the loop on.
    pub const ALIAS: u64 = 0x4000_0000;
    /// The loop of the second vCPU, in real mode.
    pub const SECOND_LOOP: u64 = 0x8000;
    /// 32 bits: its rounds.
    pub const SECOND_COUNTER: u64 = 0x8100;
}

/// Where [`Program::Count`] counts, 32 bits each: far from each other, in 32 MiB of memory.
pub const COUNTERS: [u64; 2] = [0x40_0000, 0x1f0_0000];

/// What [`Program::Chatter`] repeats.
pub const CHATTER: &str = "fifteen letters\n";

/// How often [`Program::Job`] prints the bytes from 0 to 255.
pub const JOB_ROUNDS: usize = 0x800;

/// Sectors of the image that [`Program::Disk`] expects.
pub const DISK_SECTORS: u64 = 64;

unsafe extern "C" {
    safe static guest_start: u8;
    safe static guest_end: u8;
}

impl Program {
    /// The code of all programs, for [`BASE`].
    pub fn code() -> &'static [u8] {
        let start = &raw const guest_start;
        let length = (&raw const guest_end).addr() - start.addr();
        // SAFETY: the two labels enclose initialised, read-only bytes of this executable.
        unsafe { slice::from_raw_parts(start, length) }
    }

    /// Where in the code this program begins.
    pub fn offset(self) -> u32 {
        let table = self as usize * 4;
        u32::from_le_bytes(Self::code()[table..table + 4].try_into().unwrap())
    }
}

/// `count` 32-bit little-endian words from `first` up: a sector's content as the programs make and check it.
pub fn words(first: u32, count: u32) -> Vec<u8> {
    (first..first + count).flat_map(u32::to_le_bytes).collect()
}
