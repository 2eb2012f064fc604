//! The keyboard controller's ports, of which a guest gets one function: reset.
//!
//! To a probing kernel there is no controller: data seems to be waiting for ever, which is what
//! makes Linux give up at once ("No controller found") instead of waiting for answers to commands.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::bus::BusDevice;

/// First port of the range.
pub const BASE: u16 = 0x60;
/// Ports 0x60 to 0x64.
pub const LEN: u16 = 5;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;

const CMD_WRITE_OUTPUT: u8 = 0xd1;
const CMD_RESET: u8 = 0xfe;
/// Output buffer full; input buffer empty (so that whoever wants to write, may).
const STATUS: u8 = 0x01;
/// Timer 2's output in port B: kernels that calibrate with it wait for this bit to rise.
const TIMER2_OUT: u8 = 0x20;

/// Ports 0x60 to 0x64.
#[derive(Debug)]
pub struct I8042 {
    reset: Arc<AtomicBool>,
    output_next: Mutex<bool>,
}

impl I8042 {
    /// `reset` is set when the guest asks for a reset.
    pub fn new(reset: Arc<AtomicBool>) -> Self {
        Self {
            reset,
            output_next: Mutex::new(false),
        }
    }

    /// State for `restore`.
    pub fn save(&self) -> serde_json::Value {
        serde_json::json!({ "version": 1, "output_next": *self.lock() })
    }

    /// Takes back what `save` gave.
    ///
    /// # Errors
    /// When the state is of another version.
    pub fn restore(&self, state: &serde_json::Value) -> Result<(), crate::virtio::StateError> {
        let output_next = state["output_next"]
            .as_bool()
            .filter(|_| state["version"] == 1);
        *self.lock() = output_next.ok_or_else(|| crate::virtio::StateError {
            device: "i8042",
            reason: "it is not version 1".to_owned(),
        })?;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, bool> {
        self.output_next
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte, ..] = data {
            *byte = match offset {
                COMMAND => STATUS,
                PORT_B => TIMER2_OUT,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [byte] = data else { return };
        let mut output_next = self.lock();
        let reset = match (offset, *byte) {
            (COMMAND, command) => {
                *output_next = command == CMD_WRITE_OUTPUT;
                command == CMD_RESET
            }
            // Bit 0 of the output port is the processor's reset line, active low.
            (DATA, value) => std::mem::take(&mut *output_next) && value & 1 == 0,
            _ => false,
        };
        if reset {
            self.reset.store(true, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> (I8042, Arc<AtomicBool>) {
        let reset = Arc::new(AtomicBool::new(false));
        (I8042::new(Arc::clone(&reset)), reset)
    }

    #[test]
    fn both_ways_to_reset() {
        let (device, reset) = device();
        device.write(COMMAND, &[0xaa]);
        device.write(DATA, &[0xfe]);
        assert!(!reset.swap(false, Ordering::SeqCst));
        device.write(COMMAND, &[0xfe]);
        assert!(reset.swap(false, Ordering::SeqCst));
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0xdf]);
        assert!(!reset.swap(false, Ordering::SeqCst));
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0xfe]);
        assert!(reset.swap(false, Ordering::SeqCst));
    }

    #[test]
    fn probes_end_fast() {
        let (device, _reset) = device();
        let mut data = [0xff];
        device.read(COMMAND, &mut data);
        // Data never runs out (the kernel's flush gives up), writing is always possible.
        assert_eq!(data[0] & 3, 1);
        device.read(PORT_B, &mut data);
        assert_eq!(data[0] & 0x20, 0x20);
        let mut wide = [0xff; 8];
        device.read(2, &mut wide);
        assert_eq!(wide, [0; 8]);
    }

    #[test]
    fn state_round_trip() {
        let (device, _reset) = device();
        device.write(COMMAND, &[0xd1]);
        let (other, reset) = self::device();
        other.restore(&device.save()).unwrap();
        other.write(DATA, &[0]);
        assert!(reset.swap(false, Ordering::SeqCst));
        assert!(other.restore(&serde_json::json!({})).is_err());
    }
}
