//! The MC146818 real time clock, as far as a guest reads the time and keeps bytes in it.
//!
//! Time is the host's, in UTC. Alarms and periodic interrupts do not exist; writes to the time
//! registers are forgotten. Without the device a Linux guest waits a second at boot for the
//! "update in progress" bit of a floating bus to clear.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;
use crate::virtio::StateError;

/// First port of the range: index, then data.
pub const BASE: u16 = 0x70;
/// Two ports.
pub const LEN: u16 = 2;

const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 32 kHz time base, 1024 Hz rate; never "update in progress".
const A_DEFAULT: u8 = 0x26;
const A_UIP: u8 = 0x80;
const B_24H: u8 = 0x02;
const B_BINARY: u8 = 0x04;
/// Time and memory are valid.
const D_VALID: u8 = 0x80;
const PM: u8 = 0x80;

/// Seconds since the epoch.
type Clock = Box<dyn Fn() -> u64 + Send>;

/// Ports 0x70 and 0x71.
pub struct Rtc {
    inner: Mutex<Inner>,
}

struct Inner {
    index: u8,
    memory: [u8; 128],
    clock: Clock,
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rtc").finish_non_exhaustive()
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_clock(Box::new(|| {
            // Before 1970 there was no host.
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs())
        }))
    }

    fn with_clock(clock: Clock) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(REG_A)] = A_DEFAULT;
        memory[usize::from(REG_B)] = B_24H;
        Self {
            inner: Mutex::new(Inner {
                index: 0,
                memory,
                clock,
            }),
        }
    }

    /// State for `restore`.
    pub fn save(&self) -> serde_json::Value {
        let inner = self.lock();
        serde_json::json!({ "version": 1, "index": inner.index, "memory": inner.memory.as_slice() })
    }

    /// Takes back what `save` gave.
    ///
    /// # Errors
    /// When the state is of another version or incomplete.
    pub fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let bad = |reason: &str| StateError {
            device: "rtc",
            reason: reason.to_owned(),
        };
        if state["version"] != 1 {
            return Err(bad("it is not version 1"));
        }
        let byte = |v: &serde_json::Value| v.as_u64().and_then(|v| u8::try_from(v).ok());
        let memory: Option<Vec<u8>> = state["memory"]
            .as_array()
            .and_then(|bytes| bytes.iter().map(byte).collect());
        let memory = memory
            .and_then(|m| <[u8; 128]>::try_from(m).ok())
            .ok_or_else(|| bad("its memory is not 128 bytes"))?;
        let index = byte(&state["index"]).ok_or_else(|| bad("it has no register index"))?;
        let mut inner = self.lock();
        inner.index = index & 0x7f;
        inner.memory = memory;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn read(&self) -> u8 {
        let b = self.memory[usize::from(REG_B)];
        let encode = |value: u64| {
            let value = (value % 100) as u8;
            if b & B_BINARY == 0 {
                ((value / 10) << 4) | (value % 10)
            } else {
                value
            }
        };
        let time = || Civil::from_unix((self.clock)());
        match self.index {
            0 => encode(time().second),
            2 => encode(time().minute),
            4 if b & B_24H != 0 => encode(time().hour),
            4 => {
                let hour = time().hour;
                let pm = if hour >= 12 { PM } else { 0 };
                encode((hour + 11) % 12 + 1) | pm
            }
            6 => encode(time().weekday),
            7 => encode(time().day),
            8 => encode(time().month),
            9 => encode(time().year),
            CENTURY => encode(time().year / 100),
            REG_A => self.memory[usize::from(REG_A)] & !A_UIP,
            REG_C => 0,
            REG_D => D_VALID,
            index => self.memory.get(usize::from(index)).copied().unwrap_or(0),
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inner = self.lock();
        if let [byte, ..] = data {
            *byte = match offset {
                0 => inner.index,
                1 => inner.read(),
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [byte] = data else { return };
        let mut inner = self.lock();
        match offset {
            // Bit 7 masks non-maskable interrupts; there are none.
            0 => inner.index = byte & 0x7f,
            1 => {
                let index = usize::from(inner.index);
                if let Some(cell) = inner.memory.get_mut(index) {
                    *cell = *byte;
                }
            }
            _ => {}
        }
    }
}

/// A date and time in UTC.
#[derive(Debug, PartialEq, Eq)]
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        // 0001-01-01 of the Gregorian calendar is 719,162 days before the epoch. Counting from a
        // March 1st puts the leap day at the end of the year.
        let day = days + 719_162 + 306;
        let era = day / 146_097;
        let day_of_era = day % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = (month_from_march + 2) % 12 + 1;
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            // 1970-01-01 was a Thursday.
            weekday: (days + 4) % 7 + 1,
            hour: seconds / 3_600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut byte = [0xff];
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    fn civil(seconds: u64) -> [u64; 7] {
        let c = Civil::from_unix(seconds);
        [
            c.year, c.month, c.day, c.weekday, c.hour, c.minute, c.second,
        ]
    }

    #[test]
    fn calendar() {
        // Values of `date -u -d @SECONDS`.
        assert_eq!(civil(0), [1970, 1, 1, 5, 0, 0, 0]);
        assert_eq!(civil(951_782_399), [2000, 2, 28, 2, 23, 59, 59]);
        assert_eq!(civil(951_782_400), [2000, 2, 29, 3, 0, 0, 0]);
        assert_eq!(civil(951_868_800), [2000, 3, 1, 4, 0, 0, 0]);
        assert_eq!(civil(1_735_689_599), [2024, 12, 31, 3, 23, 59, 59]);
        assert_eq!(civil(4_107_542_400), [2100, 3, 1, 2, 0, 0, 0]);
    }

    #[test]
    fn formats_follow_register_b() {
        let rtc = Rtc::with_clock(Box::new(|| 1_735_689_599));
        assert_eq!(get(&rtc, 0), 0x59);
        assert_eq!(get(&rtc, 4), 0x23);
        assert_eq!(get(&rtc, 7), 0x31);
        assert_eq!(get(&rtc, 9), 0x24);
        assert_eq!(get(&rtc, CENTURY), 0x20);
        set(&rtc, REG_B, B_24H | B_BINARY);
        assert_eq!(get(&rtc, 4), 23);
        assert_eq!(get(&rtc, 8), 12);
        set(&rtc, REG_B, B_BINARY);
        assert_eq!(get(&rtc, 4), 11 | PM);
        let noon = Rtc::with_clock(Box::new(|| 12 * 3_600));
        set(&noon, REG_B, 0);
        assert_eq!(get(&noon, 4), 0x12 | PM);
    }

    #[test]
    fn status_never_keeps_a_kernel_waiting() {
        let rtc = Rtc::new();
        set(&rtc, REG_A, 0xff);
        assert_eq!(get(&rtc, REG_A) & A_UIP, 0);
        assert_eq!(get(&rtc, REG_C), 0);
        assert_eq!(get(&rtc, REG_D), D_VALID);
    }

    #[test]
    fn state_round_trip() {
        let rtc = Rtc::with_clock(Box::new(|| 0));
        set(&rtc, 0x40, 0x5a);
        let other = Rtc::with_clock(Box::new(|| 0));
        other.restore(&rtc.save()).unwrap();
        assert_eq!(other.save(), rtc.save());
        assert_eq!(get(&other, 0x40), 0x5a);
        assert!(other.restore(&serde_json::json!({ "version": 1 })).is_err());
    }
}
