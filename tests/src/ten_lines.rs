//! Guests of about ten lines, and the smallest monitor that runs them: the chapter *Ten-line guests* explains both.
//!
//! `hello`, `port`, `mmio` and `interrupt` run in real mode in a [`TinyVm`]; `virtqueue` needs a disk, so that minivmm runs it
//! ([`Program::Virtqueue`](crate::guest::Program)).
#![expect(
    unsafe_code,
    reason = "the programs are assembled into this executable; a memory slot and an interrupt have no safe interface"
)]

use std::slice;

use kvm_bindings::{KVMIO, kvm_interrupt, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

/// Where a guest is loaded, and begins.
pub const LOADED: u64 = 0x1000;
/// Bytes of memory, from address 0.
pub const MEMORY: usize = 0x1_0000;

/// Assembles a file between two labels, and gives its bytes a name.
macro_rules! guests {
    ($($(#[$doc:meta])* $name:ident = $file:literal, $start:ident, $end:ident;)+) => {
        core::arch::global_asm!(
            ".pushsection .rodata.ten_line_guests, \"a\", @progbits",
            ".set LOADED, {loaded}",
            ".code16",
            $(
                concat!(".globl ", stringify!($start)), concat!(".globl ", stringify!($end)),
                concat!(stringify!($start), ":"), include_str!($file), concat!(stringify!($end), ":"),
            )+
            ".code64",
            ".popsection",
            loaded = const LOADED,
            options(att_syntax),
        );
        $($(#[$doc])* pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                safe static $start: u8;
                safe static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: the two labels enclose initialized, read-only bytes of this executable.
            unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }
        })+
    };
}

guests! {
    /// Prints a text on the serial port.
    hello = "ten_lines/hello.s", ten_lines_hello, ten_lines_hello_end;
    /// Reads a port, and writes another.
    port = "ten_lines/port.s", ten_lines_port, ten_lines_port_end;
    /// Reads and writes where no memory is.
    mmio = "ten_lines/mmio.s", ten_lines_mmio, ten_lines_mmio_end;
    /// Takes interrupts.
    interrupt = "ten_lines/interrupt.s", ten_lines_interrupt, ten_lines_interrupt_end;
}

/// A virtual machine of one processor, [`MEMORY`] bytes and no device.
#[derive(Debug)]
pub struct TinyVm {
    /// For what a guest needs beside this.
    pub vm: VmFd,
    vcpu: VcpuFd,
    memory: GuestMemoryMmap<()>,
}

impl TinyVm {
    /// The vCPU is about to execute the first byte of `code`, in real mode. With `interrupt_chips` KVM has interrupt controllers: a
    /// vCPU that halts then stays in KVM, and [`Self::interrupt`] does not work.
    pub fn new(code: &[u8], interrupt_chips: bool) -> Self {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        memory.write_slice(code, GuestAddress(LOADED)).unwrap();
        let slot = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: the memory is dropped after the descriptors of the VM and its vCPU, which are in the same value before it.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        if interrupt_chips {
            vm.create_irq_chip().unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut segments = vcpu.get_sregs().unwrap();
        (segments.cs.base, segments.cs.selector) = (0, 0);
        vcpu.set_sregs(&segments).unwrap();
        let mut registers = vcpu.get_regs().unwrap();
        (registers.rip, registers.rsp, registers.rflags) = (LOADED, LOADED, 2);
        vcpu.set_regs(&registers).unwrap();
        Self { vm, vcpu, memory }
    }

    /// Runs the guest until something outside KVM has to act.
    pub fn run(&mut self) -> VcpuExit<'_> {
        self.vcpu.run().unwrap()
    }

    /// The vCPU takes an interrupt of this vector when it runs next (KVM_INTERRUPT).
    pub fn interrupt(&self, vector: u32) {
        ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
        // SAFETY: the ioctl reads a structure of this type.
        let result =
            unsafe { ioctl_with_ref(&self.vcpu, KVM_INTERRUPT(), &kvm_interrupt { irq: vector }) };
        assert_eq!(result, 0, "KVM_INTERRUPT: {}", std::io::Error::last_os_error());
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }
}

/// Runs a guest, and says in a line for each exit why it left the processor, as the chapter shows it. A read of a port or address
/// gives 41. The guest ends when it halts a second time; the first time it gets an interrupt of vector 32 if it takes any.
pub fn story(code: &[u8], takes_interrupts: bool) -> Vec<String> {
    let mut vm = TinyVm::new(code, false);
    let mut lines = Vec::new();
    loop {
        let (line, halted) = match vm.run() {
            VcpuExit::IoOut(port, data) => {
                (format!("KVM_EXIT_IO: writes {data:?} to port {port:#x}"), false)
            }
            VcpuExit::IoIn(port, data) => {
                data.fill(41);
                (format!("KVM_EXIT_IO: reads {} byte from port {port:#x}", data.len()), false)
            }
            VcpuExit::MmioRead(address, data) => {
                data[0] = 41;
                (format!("KVM_EXIT_MMIO: reads {} bytes from {address:#x}", data.len()), false)
            }
            VcpuExit::MmioWrite(address, data) => {
                (format!("KVM_EXIT_MMIO: writes {data:?} to {address:#x}"), false)
            }
            VcpuExit::Hlt => ("KVM_EXIT_HLT".to_owned(), true),
            other => panic!("{other:?} after {lines:#?}"),
        };
        let first = !lines.contains(&line);
        lines.push(line);
        if halted && takes_interrupts && first {
            vm.interrupt(32);
        } else if halted {
            return lines;
        }
    }
}
