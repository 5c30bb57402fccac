//! The guest's driver on one side of the UART, the console on the other.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

use super::super::tests::in_byte;
use super::*;

// Offsets and bits of the 16550 (National Semiconductor PC16550D, table II).
pub(super) const DATA: u64 = 0;
pub(super) const INTERRUPT_ENABLE: u64 = 1;
pub(super) const DATA_READY: u8 = 1;
pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 5;

#[derive(Clone, Default)]
pub(super) struct Output(pub(super) Arc<Mutex<Vec<u8>>>);

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

impl InterruptLine for Edges {
    fn pulse(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

pub(super) struct Machine {
    pub(super) serial: SerialDevice,
    pub(super) output: Output,
    edges: Arc<Edges>,
    drained: EventFd,
}

pub(super) fn machine() -> Machine {
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

    pub(super) fn receive(&mut self) -> Vec<u8> {
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
    assert!(!machine.was_drained(), "the console did not wait");
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
fn a_handler_that_stops_early_is_told_of_the_rest_unless_it_masks() {
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
fn room_is_announced_once_and_only_to_a_console_that_waits() {
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
fn a_reset_forgets_the_driver_but_not_that_the_console_waits() {
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
fn a_saved_port_continues_in_another_one() {
    let mut machine = machine();
    machine.serial.write(3, &[0x83]);
    machine.serial.write(DATA, &[12]);
    machine.serial.write(3, &[3]);
    machine.serial.write(MODEM_CONTROL.into(), &[11]);
    machine.serial.write(INTERRUPT_ENABLE, &[ENABLE_DATA_AVAILABLE]);
    machine.serial.write(7, &[0x5a]);
    assert_eq!(machine.serial.enqueue(b"typed"), 5);
    // The first byte is read: from here on vm-superio has no receive interrupt pending.
    assert_eq!(in_byte(&mut machine.serial, DATA), b't');
    let state = serde_json::to_string(&machine.serial.save()).unwrap();

    let mut other = super::tests::machine();
    other.serial.restore(&serde_json::from_str(&state).unwrap()).unwrap();
    assert_eq!(other.serial.save(), machine.serial.save());
    assert_ne!(other.edges.0.load(Ordering::Relaxed), 0, "the handler is called for the rest");
    assert_eq!(other.receive(), b"yped");
    other.serial.write(DATA, b"o");
    assert_eq!(*other.output.0.lock().unwrap(), b"o");
    assert_eq!(in_byte(&mut other.serial, 7), 0x5a);
    let overfull = SerialState { input: vec![0; FIFO_SIZE + 1], ..other.serial.save() };
    assert!(other.serial.restore(&overfull).is_err());
}

#[test]
fn a_port_without_input_raises_nothing_when_restored() {
    let (machine, mut other) = (machine(), machine());
    other.serial.restore(&machine.serial.save()).unwrap();
    assert_eq!(other.edges.0.load(Ordering::Relaxed), 0);
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
