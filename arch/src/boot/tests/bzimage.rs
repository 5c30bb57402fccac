//! bzImages.

use super::*;

const SETUP_SECTORS: usize = 2;
const PREFERRED: u64 = 16 * MIB;
const INIT_SIZE: u32 = 8 * MIB as u32;

pub(super) fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; (1 + SETUP_SECTORS) * 512];
    bytes[0x1f1] = SETUP_SECTORS as u8;
    let payload = 0x2_0000;
    let mut put =
        |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
    put(0x1f4, &(payload as u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    // The header ends at 0x202 + 0x66: version 2.12 has no kernel_info_offset, what is there is code.
    put(0x200, &[0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020cu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &(2 * MIB as u32).to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &PREFERRED.to_le_bytes());
    put(0x260, &INIT_SIZE.to_le_bytes());
    put(0x268, &[0xcc; 4]);
    bytes.extend((0..payload).map(|n: usize| n as u8));
    bytes
}

#[test]
fn a_bzimage_goes_where_it_need_not_move() {
    let kernel = parse(bzimage());
    assert_eq!((kernel.protocol, kernel.cmdline_limit), (Protocol::Linux64, 2047));
    let plan = planned(&kernel, 64 * MIB, Some(5000));
    assert_eq!(
        plan.entry,
        Entry {
            protocol: Protocol::Linux64,
            ip: GuestAddress(PREFERRED + 0x200),
            start: layout::ZERO_PAGE
        }
    );
    assert_eq!(plan.kernel, [range(3 * 512, PREFERRED, 0x2_0000)]);
    let params: boot_params = read(&plan, layout::ZERO_PAGE);
    assert_eq!({ params.hdr.init_size }, INIT_SIZE);
    assert_eq!({ params.hdr.kernel_info_offset }, 0, "code, not header");
    assert_eq!({ params.hdr.type_of_loader }, 0xff);
    assert_eq!({ params.hdr.code32_start }, PREFERRED as u32);
    assert_eq!(
        ({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }),
        (64 * MIB as u32 - 0x2000, 5000)
    );
    assert_eq!(plan.initrd, Some(range(0, 64 * MIB - 0x2000, 5000)));
}

#[test]
fn a_bzimage_that_cannot_be_moved_loads_at_1_mib() {
    let plan = planned(&parse(patched(bzimage(), 0x234, &[0])), 64 * MIB, None);
    assert_eq!(plan.entry.ip, GuestAddress(MIB + 0x200));
    assert_eq!(plan.kernel, [range(3 * 512, MIB, 0x2_0000)]);
}

#[test]
fn an_initrd_stays_where_the_kernel_reaches_it() {
    let kernel = parse(patched(bzimage(), 0x22c, &0x02ff_ffffu32.to_le_bytes()));
    assert_eq!(planned(&kernel, 64 * MIB, Some(0x1000)).initrd, Some(range(0, 0x2ff_f000, 0x1000)));
}

/// Debian's kernel lies from 16 to 62 MiB, and yet boots in 64 MiB.
#[test]
fn an_initrd_that_does_not_fit_above_the_kernel_goes_below() {
    let plan = planned(&parse(bzimage()), 25 * MIB, Some(2 * MIB));
    assert_eq!(plan.initrd, Some(range(0, 14 * MIB, 2 * MIB)));
}

#[test]
fn unsuitable_bzimages_are_named() {
    let table: &[(&str, Vec<u8>, &str)] = &[
        (
            "old",
            patched(bzimage(), 0x206, &[0x0b, 0x02]),
            "no 64-bit entry point (boot protocol 2.11, before 2.12)",
        ),
        (
            "32-bit",
            patched(bzimage(), 0x236, &[0, 0]),
            "no 64-bit entry point (XLF_KERNEL_64 is not set)",
        ),
        ("zImage", patched(bzimage(), 0x211, &[0]), "damaged (a zImage"),
        ("alignment", patched(bzimage(), 0x230, &[3, 0, 0, 0]), "damaged (alignment 0x3)"),
        (
            "cut in payload",
            bzimage()[..0x1000].to_vec(),
            "truncated: its compressed kernel ends at byte 132608",
        ),
        (
            "high up",
            patched(bzimage(), 0x258, &(u64::MAX - 9).to_le_bytes()),
            "damaged (preferred address 0xfffffffffffffff6)",
        ),
        ("cut in setup", bzimage()[..0x300].to_vec(), "truncated: its compressed kernel"),
        ("cut in header", bzimage()[..0x220].to_vec(), "truncated: its setup header"),
    ];
    for (name, bytes, expected) in table {
        let message = refusal(bytes);
        assert!(message.contains(expected), "{name}: {message}");
        assert!(!message.contains('\n'), "{name}");
    }
}
