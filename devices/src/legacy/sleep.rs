//! The sleep registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7): how a guest with ACPI powers
//! itself off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::BusDevice;

/// Control and status register, a port each.
pub const LEN: u16 = 2;

const CONTROL: u64 = 0;
/// `SLP_EN`: enter the state of `SLP_TYP`.
const ENABLE: u8 = 1 << 5;
const TYPE_SHIFT: u8 = 2;
const TYPE_MASK: u8 = 7;

/// Two ports. There is no state to save: status reads as zero, control is write-only.
#[derive(Debug)]
pub struct Sleep {
    off: Arc<AtomicBool>,
    off_type: u8,
}

impl Sleep {
    /// `off` is set when the guest enters the sleep type `off_type` (0 to 7). Other states do
    /// not exist here, and a guest that asks for one goes on.
    pub fn new(off: Arc<AtomicBool>, off_type: u8) -> Self {
        Self { off, off_type }
    }
}

impl BusDevice for Sleep {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (CONTROL, [byte]) = (offset, data)
            && byte & ENABLE != 0
            && byte >> TYPE_SHIFT & TYPE_MASK == self.off_type
        {
            self.off.store(true, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_off_with_the_enable_bit_powers_off() {
        let off = Arc::new(AtomicBool::new(false));
        let sleep = Sleep::new(Arc::clone(&off), 5);
        let mut data = [0xff];
        sleep.read(1, &mut data);
        assert_eq!(data, [0]);
        sleep.write(0, &[5 << 2]);
        sleep.write(0, &[3 << 2 | ENABLE]);
        sleep.write(1, &[5 << 2 | ENABLE]);
        sleep.write(0, &[5 << 2 | ENABLE, 0]);
        assert!(!off.load(Ordering::SeqCst));
        sleep.write(0, &[5 << 2 | ENABLE]);
        assert!(off.load(Ordering::SeqCst));
    }
}
