//! A vCPU's registers in GDB's order, and back.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use kvm_bindings::{kvm_fpu, kvm_regs};

use crate::error::Error;
use crate::vcpu::Vcpu;

/// # Errors
/// KVM refuses to read them.
pub(super) fn read(vcpu: &Vcpu) -> Result<X86_64CoreRegs, Error> {
    let failed = || Error::kvm("read a vCPU's registers");
    let regs = vcpu.fd.get_regs().map_err(failed())?;
    let sregs = vcpu.fd.get_sregs().map_err(failed())?;
    let fpu = vcpu.fd.get_fpu().map_err(failed())?;
    let [cs, ss, ds, es, fs, gs] = [sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs]
        .map(|segment| u32::from(segment.selector));
    Ok(X86_64CoreRegs {
        regs: [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        // The upper half is reserved (SDM 1 §3.4.3).
        eflags: regs.rflags as u32,
        rip: regs.rip,
        segments: X86SegmentRegs { cs, ss, ds, es, fs, gs },
        st: fpu.fpr.map(|[a, b, c, d, e, f, g, h, i, j, ..]| [a, b, c, d, e, f, g, h, i, j]),
        fpu: X87FpuInternalRegs {
            fctrl: fpu.fcw.into(),
            fstat: fpu.fsw.into(),
            ftag: fpu.ftwx.into(),
            fop: fpu.last_opcode.into(),
            fioff: fpu.last_ip as u32,
            fooff: fpu.last_dp as u32,
            ..Default::default()
        },
        xmm: fpu.xmm.map(u128::from_le_bytes),
        mxcsr: fpu.mxcsr,
    })
}

/// Returns false, and changes nothing, if a segment register has another value than now: GDB sends only its selector, and KVM also needs
/// base, limit and attributes.
///
/// # Errors
/// KVM refuses to write them.
pub(super) fn write(vcpu: &Vcpu, wanted: &X86_64CoreRegs) -> Result<bool, Error> {
    if read(vcpu)?.segments != wanted.segments {
        return Ok(false);
    }
    let failed = || Error::kvm("write a vCPU's registers");
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15] =
        wanted.regs;
    let (rip, rflags) = (wanted.rip, u64::from(wanted.eflags));
    let regs = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    };
    let old = vcpu.fd.get_fpu().map_err(failed())?;
    let fpu = kvm_fpu {
        fpr: wanted.st.map(|value| {
            let mut register = [0; 16];
            register[..10].copy_from_slice(&value);
            register
        }),
        fcw: wanted.fpu.fctrl as u16,
        fsw: wanted.fpu.fstat as u16,
        ftwx: wanted.fpu.ftag as u8,
        xmm: wanted.xmm.map(u128::to_le_bytes),
        mxcsr: wanted.mxcsr,
        ..old
    };
    vcpu.fd.set_fpu(&fpu).map_err(failed())?;
    vcpu.fd.set_regs(&regs).map_err(failed())?;
    Ok(true)
}
