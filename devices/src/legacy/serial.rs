//! COM1: a 16550A on top of vm-superio's, with what it leaves to its user: input of any length through a 64-byte FIFO.
//!
//! Quirks of vm-superio 0.8 that are left as they are:
//! - A receive and a transmit interrupt that are pending together read as IIR 6, "line status", and reading clears
//!   both. Linux looks only at IIR's "nothing pending" bit and then serves whatever LSR shows, receiver and transmitter
//!   alike (serial8250_handle_irq in drivers/tty/serial/8250/8250_port.c), so it loses nothing.
//! - The FIFO control register is ignored: a driver that clears the receive FIFO still gets what was typed before.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::Serial;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::irq::Trigger;
use crate::log_limit::LogLimit;

/// Bytes in the receive FIFO.
const FIFO_SIZE: usize = 64;
/// Offset of the interrupt identification register.
const INTERRUPT_IDENTIFICATION: u8 = 2;
/// Interrupt identification: nothing is pending.
const NO_INTERRUPT: u8 = 1;
/// Interrupt identification: the receiver has data.
const DATA_AVAILABLE: u8 = 1 << 2;
/// Interrupt enable bit of the same.
const ENABLE_DATA_AVAILABLE: u8 = 1;
/// Offset of the line status register.
const LINE_STATUS: u8 = 5;
/// This many reads of the line status in a row are a driver that waits for input: it never has to wait for output, the
/// transmitter is always ready.
const POLLS_FOR_INPUT: u8 = 8;
/// Offset of the modem control register.
const MODEM_CONTROL: u8 = 4;
/// Modem control bit: the transmitter feeds the receiver, and the line is cut off.
const LOOPBACK: u8 = 1 << 4;

/// The UART.
pub struct SerialDevice {
    uart: Uart,
    interrupt: Arc<dyn Trigger>,
    on_input_drained: EventFd,
    /// Somebody was told that there is no room and waits to hear that there is.
    input_blocked: bool,
    /// Reads of the line status in a row, up to `POLLS_FOR_INPUT`.
    polls: u8,
    log_limit: LogLimit,
}

type Uart = Serial<InterruptLine, NoEvents, Box<dyn Write + Send>>;

/// The wire of IRQ 4, in vm-superio's terms.
struct InterruptLine(Arc<dyn Trigger>);

impl vm_superio::Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

impl SerialDevice {
    /// Bytes of address space.
    pub const SIZE: u64 = 8;

    /// A UART after reset. It asserts `interrupt`, an edge each time, and writes what the guest sends to `output`, byte
    /// by byte on the vCPU's thread: `output` must never block. `on_input_drained` is written once the guest can take
    /// input again after `input_room` or `enqueue` had to refuse some.
    pub fn new(interrupt: Arc<dyn Trigger>, output: Box<dyn Write + Send>, on_input_drained: EventFd) -> Self {
        Self {
            uart: Serial::new(InterruptLine(Arc::clone(&interrupt)), output),
            interrupt,
            on_input_drained,
            input_blocked: false,
            polls: 0,
            log_limit: LogLimit::new(),
        }
    }

    /// How many bytes `enqueue` would accept now. When that is 0, `on_input_drained` tells when to ask again.
    pub fn input_room(&mut self) -> usize {
        let room = if self.takes_input() { self.uart.fifo_capacity() } else { 0 };
        self.input_blocked |= room == 0;
        room
    }

    /// Passes typed bytes to the guest and returns how many of them it took. Keep the rest, and offer it again after
    /// `on_input_drained`.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let accepted = bytes.len().min(self.input_room());
        // It fails only on a full FIFO, which the line above excludes, or at raising the interrupt.
        if let Err(error) = self.uart.enqueue_raw_bytes(&bytes[..accepted]) {
            self.report(&error);
        }
        self.input_blocked |= accepted < bytes.len();
        accepted
    }

    /// Why the interrupt was raised. On the chip a receive interrupt is pending for as long as there is data;
    /// vm-superio's is over with the first byte that is read. Linux reads 256 bytes at most, then looks here whether
    /// there is more: a paste that goes on while it reads would get stuck.
    fn interrupt_identification(&mut self) -> u8 {
        let identification = self.uart.read(INTERRUPT_IDENTIFICATION);
        let data = self.uart.fifo_capacity() < FIFO_SIZE;
        if identification & NO_INTERRUPT != 0 && data && self.data_interrupt_enabled() {
            (identification & !NO_INTERRUPT) | DATA_AVAILABLE
        } else {
            identification
        }
    }

    /// Input has to wait until the guest listens: until its driver enables the receive interrupt, or polls. Linux
    /// throws away what it finds in the FIFO before that (serial8250_do_startup), which would cost a script on our
    /// standard input its first bytes. It waits also while the guest tests its UART in loopback, which cuts the line
    /// off.
    fn takes_input(&mut self) -> bool {
        (self.data_interrupt_enabled() || self.polls == POLLS_FOR_INPUT)
            && self.uart.read(MODEM_CONTROL) & LOOPBACK == 0
    }

    /// Read from the saved state, since the register's offset leads elsewhere while the divisor latch is open.
    fn data_interrupt_enabled(&self) -> bool {
        self.uart.state().interrupt_enable & ENABLE_DATA_AVAILABLE != 0
    }

    /// After any access of the guest's: it may have been the one that made room. Waiting until the FIFO is empty gives
    /// one wake-up for 64 bytes.
    fn after_access(&mut self, polled: bool) {
        self.polls = if polled { POLLS_FOR_INPUT.min(self.polls + 1) } else { 0 };
        if self.input_blocked && self.uart.fifo_capacity() == FIFO_SIZE && self.takes_input() {
            self.input_blocked = false;
            if let Err(error) = self.on_input_drained.write(1) {
                self.report(&error);
            }
        }
    }

    fn report(&self, error: &dyn Display) {
        if let Some(suppressed) = self.log_limit.admit() {
            tracing::warn!(%error, suppressed, "serial port");
        }
    }
}

impl BusDevice for SerialDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = match offset {
                INTERRUPT_IDENTIFICATION => self.interrupt_identification(),
                _ => self.uart.read(offset),
            };
            self.after_access(offset == LINE_STATUS);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            if let Err(error) = self.uart.write(offset, *value) {
                self.report(&error);
            }
            self.after_access(false);
        }
    }

    /// What was typed and not read is lost. Whoever waits for room still does, until the next driver listens.
    fn reset(&mut self) {
        let output = std::mem::replace(self.uart.writer_mut(), Box::new(io::sink()));
        self.uart = Serial::new(InterruptLine(Arc::clone(&self.interrupt)), output);
        self.polls = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

    use super::super::tests::in_byte;
    use super::*;

    // Offsets and bits of the 16550 (National Semiconductor PC16550D, table II).
    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const DATA_READY: u8 = 1;
    const TRANSMITTER_EMPTY: u8 = 1 << 5;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl Trigger for Edges {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    struct Machine {
        serial: SerialDevice,
        output: Output,
        edges: Arc<Edges>,
        drained: EventFd,
    }

    fn machine() -> Machine {
        let (output, edges) = (Output::default(), Arc::new(Edges::default()));
        let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let on_drained = drained.try_clone().unwrap();
        let serial = SerialDevice::new(Arc::clone(&edges) as _, Box::new(output.clone()), on_drained);
        Machine { serial, output, edges, drained }
    }

    impl Machine {
        /// The guest's interrupt handler: serves the receiver until nothing is pending, `most` bytes at a time.
        fn receive_at_most(&mut self, most: usize) -> Vec<u8> {
            let mut received = Vec::new();
            while in_byte(&mut self.serial, INTERRUPT_IDENTIFICATION.into()) & NO_INTERRUPT == 0 {
                for _ in 0..most {
                    if in_byte(&mut self.serial, LINE_STATUS.into()) & DATA_READY == 0 {
                        break;
                    }
                    received.push(in_byte(&mut self.serial, DATA));
                }
            }
            received
        }

        fn receive(&mut self) -> Vec<u8> {
            self.receive_at_most(256)
        }

        fn was_drained(&self) -> bool {
            self.drained.read().is_ok()
        }
    }

    #[test]
    fn output_reaches_the_sink() {
        let mut machine = machine();
        for byte in b"Linux version 6.1" {
            machine.serial.write(DATA, &[*byte]);
        }
        assert_eq!(*machine.output.0.lock().unwrap(), b"Linux version 6.1");
    }

    #[test]
    fn input_interrupts_and_reads_back() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        assert_eq!(machine.edges.0.load(Ordering::Relaxed), 0);
        assert_eq!(machine.serial.enqueue(b"ls\n"), 3);
        assert_eq!(machine.edges.0.load(Ordering::Relaxed), 1);
        assert_eq!(machine.receive(), b"ls\n");
        assert_eq!(machine.receive(), b"");
        assert!(!machine.was_drained(), "nobody was kept waiting");
    }

    #[test]
    fn input_waits_for_a_driver_that_listens() {
        let mut machine = machine();
        assert_eq!(machine.serial.enqueue(b"early"), 0);
        in_byte(&mut machine.serial, DATA);
        assert!(!machine.was_drained());
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        assert!(machine.was_drained());
        assert_eq!(machine.serial.enqueue(b"early"), 5);
        assert_eq!(machine.receive(), b"early");
    }

    #[test]
    fn a_driver_that_polls_gets_input_and_one_that_only_prints_does_not() {
        let mut machine = machine();
        let paste = [b'p'; FIFO_SIZE + 3];
        assert_eq!(machine.serial.enqueue(&paste), 0);
        for byte in b"early console output" {
            while in_byte(&mut machine.serial, LINE_STATUS.into()) & TRANSMITTER_EMPTY == 0 {}
            machine.serial.write(DATA, &[*byte]);
        }
        assert!(!machine.was_drained());

        let (mut sent, mut received) = (0, Vec::new());
        while received.len() < paste.len() {
            if machine.was_drained() {
                sent += machine.serial.enqueue(&paste[sent..]);
            }
            if in_byte(&mut machine.serial, LINE_STATUS.into()) & DATA_READY != 0 {
                received.push(in_byte(&mut machine.serial, DATA));
            }
        }
        assert_eq!(received, paste);
    }

    #[test]
    fn an_interrupt_that_was_masked_comes_when_it_is_enabled_again() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        machine.serial.enqueue(b"typed");
        machine.serial.write(INTERRUPT_ENABLE, &[0]);
        in_byte(&mut machine.serial, INTERRUPT_IDENTIFICATION.into());
        machine.edges.0.store(0, Ordering::Relaxed);
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        assert_eq!(machine.edges.0.load(Ordering::Relaxed), 1);
        assert_eq!(machine.receive(), b"typed");
    }

    #[test]
    fn a_long_paste_arrives_whole() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        let paste: Vec<u8> = (0..10 * 1024).map(|index| (index % 251) as u8).collect();
        let (mut sent, mut received) = (0, Vec::new());
        let mut turns = 0;
        while received.len() < paste.len() {
            sent += machine.serial.enqueue(&paste[sent..]);
            let interrupts = machine.edges.0.swap(0, Ordering::Relaxed);
            assert_eq!(interrupts, 1, "each time that the FIFO fills");
            received.extend(machine.receive());
            assert_eq!(machine.was_drained(), sent < paste.len(), "after {sent} bytes");
            turns += 1;
        }
        assert_eq!(received, paste);
        assert_eq!(turns, paste.len() / FIFO_SIZE);
    }

    #[test]
    fn a_handler_that_stops_early_is_told_of_the_rest_if_it_wants_to_know() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        machine.serial.enqueue(b"seven b");
        assert_eq!(machine.receive_at_most(3), b"seven b");
        machine.serial.enqueue(b"masked");
        machine.serial.write(INTERRUPT_ENABLE, &[0]);
        in_byte(&mut machine.serial, DATA);
        assert_eq!(machine.receive(), b"");
    }

    #[test]
    fn room_is_announced_once_and_only_to_those_who_wait() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        assert_eq!(machine.serial.input_room(), FIFO_SIZE);
        assert_eq!(machine.serial.enqueue(&[b'x'; FIFO_SIZE]), FIFO_SIZE);
        assert_eq!(machine.serial.input_room(), 0);
        assert_eq!(machine.serial.enqueue(b"y"), 0);
        assert_eq!(in_byte(&mut machine.serial, DATA), b'x');
        assert!(!machine.was_drained(), "not before it is empty");
        assert_eq!(machine.receive().len(), FIFO_SIZE - 1);
        assert!(machine.was_drained());
        in_byte(&mut machine.serial, DATA);
        assert!(!machine.was_drained());
    }

    #[test]
    fn loopback_keeps_input_waiting_and_loses_none() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        machine.serial.write(MODEM_CONTROL.into(), &[LOOPBACK]);
        assert_eq!(machine.serial.input_room(), 0);
        assert_eq!(machine.serial.enqueue(b"typed"), 0);
        machine.serial.write(DATA, b"t");
        assert_eq!(machine.receive(), b"t");
        assert!(!machine.was_drained());
        machine.serial.write(MODEM_CONTROL.into(), &[0]);
        assert!(machine.was_drained());
        assert_eq!(machine.serial.enqueue(b"typed"), 5);
        assert_eq!(machine.receive(), b"typed");
        assert_eq!(*machine.output.0.lock().unwrap(), b"");
    }

    #[test]
    fn a_reset_forgets_the_driver_but_not_who_waits_to_type() {
        let mut machine = machine();
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        machine.serial.write(MODEM_CONTROL.into(), &[3]);
        assert_eq!(machine.serial.enqueue(&[b'x'; FIFO_SIZE + 1]), FIFO_SIZE);
        machine.serial.reset();
        assert_eq!(in_byte(&mut machine.serial, INTERRUPT_ENABLE), 0);
        assert_eq!(in_byte(&mut machine.serial, LINE_STATUS.into()) & DATA_READY, 0);
        assert!(!machine.was_drained());
        machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        assert!(machine.was_drained());
        machine.serial.write(DATA, b"b");
        assert_eq!(*machine.output.0.lock().unwrap(), b"b");
    }

    #[test]
    fn registers_are_bytes() {
        let mut machine = machine();
        let mut wide = [0; 2];
        machine.serial.read(LINE_STATUS.into(), &mut wide);
        assert_eq!(wide, [0xff; 2]);
        machine.serial.write(DATA, b"no");
        assert_eq!(*machine.output.0.lock().unwrap(), b"");
        for offset in [SerialDevice::SIZE, 0x100, 0x105, u64::MAX] {
            machine.serial.write(offset, &[0xff]);
            in_byte(&mut machine.serial, offset);
        }
    }

    #[test]
    fn a_sink_that_fails_costs_a_byte_and_nothing_else() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let mut serial = SerialDevice::new(Arc::new(Edges::default()), Box::new(Broken), drained);
        serial.write(DATA, b"x");
        serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
        assert_eq!(serial.enqueue(b"y"), 1);
        assert_eq!(in_byte(&mut serial, DATA), b'y');
    }
}
