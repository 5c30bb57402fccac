//! The registers that the driver reads: one page of memory that the device keeps current.
//!
//! Reads of virtio-mmio registers have no side effects. So KVM can map the page into the guest as read-only memory (KVM_MEM_READONLY in
//! `Documentation/virt/kvm/api.rst`), and reads cost no exit. If the page is not mapped, the transport answers reads from it.
//!
//! `InterruptStatus` and `Status` have no copy elsewhere: worker threads set bits in them while the driver may read them.

use super::spec::mmio::{CONFIG_OFFSET, Register};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of the page.
const SIZE: usize = 0x1000;
const REGISTERS: usize = CONFIG_OFFSET as usize / 4;
/// Bytes of configuration space that a driver can see: more than any device type has (virtio 1.2 §5).
pub(crate) const CONFIG_SIZE: usize = 256;

/// One device's page. Everything in it is little-endian, as the driver reads it.
#[repr(C, align(0x1000))]
pub struct RegisterPage {
    registers: [AtomicU32; REGISTERS],
    config: [AtomicU64; CONFIG_SIZE / 8],
    _zero: [AtomicU64; (SIZE - CONFIG_OFFSET as usize - CONFIG_SIZE) / 8],
}

impl Default for RegisterPage {
    fn default() -> Self {
        Self {
            registers: std::array::from_fn(|_| AtomicU32::new(0)),
            config: std::array::from_fn(|_| AtomicU64::new(0)),
            _zero: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl RegisterPage {
    fn word(&self, register: Register) -> &AtomicU32 {
        &self.registers[register as usize / 4]
    }

    pub(crate) fn load(&self, register: Register) -> u32 {
        u32::from_le(self.word(register).load(Ordering::Acquire))
    }

    pub(crate) fn store(&self, register: Register, value: u32) {
        self.word(register).store(value.to_le(), Ordering::Release);
    }

    /// Sets bits. Whatever the caller wrote to guest memory before is visible to a driver that sees them.
    pub(crate) fn set(&self, register: Register, bits: u32) {
        waypoint!();
        self.word(register).fetch_or(bits.to_le(), Ordering::AcqRel);
    }

    pub(crate) fn clear(&self, register: Register, bits: u32) {
        self.word(register).fetch_and(!bits.to_le(), Ordering::AcqRel);
    }

    /// Replaces the configuration space; called by one thread at a time.
    ///
    /// ConfigGeneration changes before and after, and each field changes at once. So a driver that has read one half of a field before
    /// the change and one after it finds another generation, and reads again (§2.5.1). If it reads everything between the last two
    /// stores, it sees no change, and the configuration interrupt makes it read again.
    pub(crate) fn set_config(&self, config: &[u8; CONFIG_SIZE]) {
        let (fields, _) = config.as_chunks::<8>();
        let fields = || {
            self.config.iter().zip(fields).map(|(word, field)| (word, u64::from_ne_bytes(*field)))
        };
        if fields().all(|(word, field)| word.load(Ordering::Relaxed) == field) {
            return;
        }
        let generation = self.load(Register::ConfigGeneration);
        self.store(Register::ConfigGeneration, generation.wrapping_add(1));
        fence(Ordering::Release);
        fields().for_each(|(word, field)| word.store(field, Ordering::Relaxed));
        self.store(Register::ConfigGeneration, generation.wrapping_add(2));
    }

    /// Reads as the guest does where the page is mapped: any width, any alignment. Past the end there are zeroes.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        // One load for a register or a half of a field, which may be changing.
        if let (Some(register), Ok(data)) =
            (Register::decode(offset), <&mut [u8; 4]>::try_from(&mut *data))
        {
            *data = self.load(register).to_le_bytes();
            return;
        }
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.byte(offset.saturating_add(index));
        }
    }

    fn byte(&self, offset: usize) -> u8 {
        match offset.checked_sub(CONFIG_OFFSET as usize) {
            None => self.registers[offset / 4].load(Ordering::Acquire).to_ne_bytes()[offset % 4],
            Some(offset) => self
                .config
                .get(offset / 8)
                .map_or(0, |word| word.load(Ordering::Acquire).to_ne_bytes()[offset % 8]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_one_page() {
        assert_eq!((size_of::<RegisterPage>(), align_of::<RegisterPage>()), (SIZE, SIZE));
    }

    #[test]
    fn any_width_and_alignment_reads_what_lies_there() {
        let page = RegisterPage::default();
        page.store(Register::MagicValue, 0x4433_2211);
        page.store(Register::Version, 0x8877_6655);
        let mut config = [0; CONFIG_SIZE];
        config[CONFIG_SIZE - 1] = 9;
        config[0] = 7;
        page.set_config(&config);
        let read = |offset, width| {
            let mut data = vec![0xa5; width];
            page.read(offset, &mut data);
            data
        };
        assert_eq!(read(0, 4), [0x11, 0x22, 0x33, 0x44]);
        assert_eq!(read(2, 4), [0x33, 0x44, 0x55, 0x66]);
        assert_eq!(read(7, 1), [0x88]);
        assert_eq!(read(CONFIG_OFFSET - 1, 2), [0, 7]);
        assert_eq!(read(CONFIG_OFFSET + 255, 2), [9, 0]);
        assert_eq!(read(SIZE as u64 - 1, 2), [0, 0]);
        assert_eq!(read(u64::MAX - 1, 2), [0, 0]);
    }

    #[test]
    fn the_generation_moves_with_the_configuration_only() {
        let page = RegisterPage::default();
        let mut config = [0; CONFIG_SIZE];
        page.set_config(&config);
        assert_eq!(page.load(Register::ConfigGeneration), 0);
        config[3] = 1;
        page.set_config(&config);
        let generation = page.load(Register::ConfigGeneration);
        assert_ne!(generation, 0);
        page.set_config(&config);
        assert_eq!(page.load(Register::ConfigGeneration), generation);
    }
}
