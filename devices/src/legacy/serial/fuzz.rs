//! Fuzz target: a guest and a console use the UART, and a model of a chip that loses nothing is compared with it.

use std::collections::VecDeque;

use minivmm_fuzz::Input;

use super::super::tests::in_byte;
use super::tests::{DATA, DATA_READY, INTERRUPT_ENABLE, Machine, TRANSMITTER_EMPTY, machine};
use super::*;

const LINE_CONTROL: u64 = 3;
const DIVISOR_LATCH: u8 = 1 << 7;

#[derive(Default)]
struct Model {
    line_control: u8,
    modem_control: u8,
    input: VecDeque<u8>,
    output: Vec<u8>,
}

impl Model {
    fn latch_is_open(&self) -> bool {
        self.line_control & DIVISOR_LATCH != 0
    }

    fn write(&mut self, offset: u64, value: u8) {
        match offset {
            DATA if self.latch_is_open() => {}
            DATA if self.modem_control & LOOPBACK != 0 && self.input.len() == FIFO_SIZE => {}
            DATA if self.modem_control & LOOPBACK != 0 => self.input.push_back(value),
            DATA => self.output.push(value),
            LINE_CONTROL => self.line_control = value,
            offset if offset == u64::from(MODEM_CONTROL) => self.modem_control = value,
            _ => {}
        }
    }
}

fn write(machine: &mut Machine, model: &mut Model, input: &mut Input<'_>) {
    let offset = input.below(10);
    let width = input.pick(&[1, 1, 1, 1, 1, 1, 0, 2, 4]);
    let data = input.bytes(width);
    machine.serial.write(offset, data);
    if let [value] = data {
        model.write(offset, *value);
    }
}

fn check(machine: &mut Machine, model: &Model) {
    assert!(model.output == *machine.output.0.lock().unwrap(), "output was lost, or made up");
    let status = in_byte(&mut machine.serial, LINE_STATUS.into());
    assert_eq!(status & DATA_READY != 0, !model.input.is_empty());
    assert_ne!(status & TRANSMITTER_EMPTY, 0, "a driver would wait for ever");
}

#[test]
fn serial() {
    minivmm_fuzz::run("devices/serial", |input| {
        let (mut machine, mut model) = (machine(), Model::default());
        while !input.is_empty() {
            match input.below(12) {
                0..=4 => write(&mut machine, &mut model, input),
                5 if !model.latch_is_open() => {
                    let value = in_byte(&mut machine.serial, DATA);
                    assert_eq!(value, model.input.pop_front().unwrap_or(0));
                }
                6 => {
                    let mut data = [0; 8];
                    let width = input.pick(&[0, 2, 4, 8]);
                    machine.serial.read(input.u64(), &mut data[..width]);
                    assert!(data[..width].iter().all(|byte| *byte == 0xff));
                }
                7 => {
                    let typed = input.sized();
                    let taken = machine.serial.enqueue(typed);
                    model.input.extend(&typed[..taken]);
                    assert!(model.input.len() <= FIFO_SIZE);
                }
                8 => assert!(machine.serial.input_room() <= FIFO_SIZE - model.input.len()),
                9 => {
                    let identification =
                        in_byte(&mut machine.serial, INTERRUPT_IDENTIFICATION.into());
                    let waits = !model.input.is_empty() && machine.serial.data_interrupt_enabled();
                    assert!(!waits || identification & NO_INTERRUPT == 0, "input is not announced");
                }
                10 => {
                    let state = machine.serial.save();
                    machine.serial.restore(&state).unwrap();
                    assert_eq!(machine.serial.save().input, state.input);
                }
                _ => {
                    machine.serial.reset();
                    (model.line_control, model.modem_control) = (3, 8);
                    model.input.clear();
                }
            }
            check(&mut machine, &model);
        }
        // A driver that takes input gets all of it, and the console is told that there is room again.
        for (offset, value) in [(LINE_CONTROL, 3), (MODEM_CONTROL.into(), 0), (INTERRUPT_ENABLE, 1)]
        {
            machine.serial.write(offset, &[value]);
        }
        assert_eq!(machine.receive(), Vec::from(model.input));
        machine.serial.input_room();
        assert_eq!(machine.serial.enqueue(b"typed"), 5);
        assert_eq!(machine.receive(), b"typed");
    });
}
