//! A 16550 serial port: the guest's console.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::virtio::StateError;

/// First port of COM1.
pub const BASE: u16 = 0x3f8;
/// Eight ports.
pub const LEN: u16 = 8;

/// Output kept for diagnosis, in bytes.
const TAIL: usize = 64 << 10;
/// Input that waits for the guest to take it, in bytes. More is refused.
const MAX_INPUT: usize = 64 << 10;
/// The device's own FIFO, in bytes.
const FIFO: usize = 64;

type Uart = vm_superio::Serial<Line, NoEvents, Output>;

/// Ports 0x3f8 to 0x3ff.
pub struct Serial {
    inner: Mutex<Inner>,
}

struct Inner {
    /// Always there, except while it is rebuilt in `restore`.
    uart: Option<Uart>,
    waiting: VecDeque<u8>,
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        // Fails only when the counter is full, and then the line is raised already.
        let _ = self.0.write(1);
        Ok(())
    }
}

struct Output {
    sink: Box<dyn Write + Send>,
    tail: VecDeque<u8>,
    written: u64,
    dropped: u64,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for byte in data {
            if self.tail.len() == TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(*byte);
        }
        self.written += data.len() as u64;
        // A sink that is full or gone loses output: a guest's console must not stop its processor.
        if self.sink.write_all(data).is_err() {
            self.dropped += data.len() as u64;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.sink.flush();
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    waiting: Vec<u8>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// `irq` is written to raise the interrupt line. `sink` gets the guest's output on the vCPU's
    /// thread, byte by byte: it must not block for long (see [`FdSink`]); what it refuses is lost.
    pub fn new(irq: EventFd, sink: Box<dyn Write + Send>) -> Self {
        let output = Output {
            sink,
            tail: VecDeque::new(),
            written: 0,
            dropped: 0,
        };
        Self {
            inner: Mutex::new(Inner {
                uart: Some(vm_superio::Serial::new(Line(irq), output)),
                waiting: VecDeque::new(),
            }),
        }
    }

    /// Input for the guest. Returns how much was taken: at most 64 KiB wait for a guest that does
    /// not read.
    pub fn enqueue_input(&self, data: &[u8]) -> usize {
        let mut inner = self.lock();
        let take = data
            .len()
            .min(MAX_INPUT - inner.waiting.len().min(MAX_INPUT));
        inner.waiting.extend(&data[..take]);
        inner.feed();
        take
    }

    /// The last 64 KiB of the guest's output.
    pub fn tail(&self) -> Vec<u8> {
        let inner = self.lock();
        inner
            .uart
            .as_ref()
            .map_or_else(Vec::new, |u| u.writer().tail.iter().copied().collect())
    }

    /// Bytes written by the guest, and those of them the sink did not take.
    pub fn counters(&self) -> (u64, u64) {
        let inner = self.lock();
        inner
            .uart
            .as_ref()
            .map_or((0, 0), |u| (u.writer().written, u.writer().dropped))
    }

    /// State for `restore`.
    pub fn save(&self) -> serde_json::Value {
        let inner = self.lock();
        let state = inner.uart.as_ref().map(Uart::state).unwrap_or_default();
        serde_json::json!(Saved {
            version: 1,
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            fifo: state.in_buffer,
            waiting: inner.waiting.iter().copied().collect(),
        })
    }

    /// Takes back what `save` gave; raises the line again if an interrupt was pending.
    ///
    /// # Errors
    /// When the state is of another version or makes no sense.
    pub fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let bad = |reason: String| StateError {
            device: "serial",
            reason,
        };
        let saved = Saved::deserialize(state).map_err(|e| bad(e.to_string()))?;
        if saved.version != 1 {
            return Err(bad(format!("it has version {}, not 1", saved.version)));
        }
        if saved.fifo.len() > FIFO || saved.waiting.len() > MAX_INPUT {
            return Err(bad("its buffers are too long".to_owned()));
        }
        let mut inner = self.lock();
        let Some(uart) = inner.uart.take() else {
            return Err(bad("an earlier restore failed".to_owned()));
        };
        let line = Line(
            uart.interrupt_evt()
                .0
                .try_clone()
                .map_err(|e| bad(format!("its interrupt line cannot be duplicated: {e}")))?,
        );
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor[0],
            baud_divisor_high: saved.baud_divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.fifo,
        };
        let uart = vm_superio::Serial::from_state(&state, line, NoEvents, uart.into_writer())
            .map_err(|e| bad(e.to_string()))?;
        inner.uart = Some(uart);
        inner.waiting = saved.waiting.into();
        inner.feed();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Moves waiting input into the FIFO as far as there is room.
    fn feed(&mut self) {
        let Some(uart) = &mut self.uart else { return };
        while !self.waiting.is_empty() && uart.fifo_capacity() > 0 {
            let (front, _) = self.waiting.as_slices();
            // In loop-back mode nothing is taken; it stays until the guest is done testing.
            match uart.enqueue_raw_bytes(front) {
                Ok(0) | Err(_) => break,
                Ok(taken) => drop(self.waiting.drain(..taken)),
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 4096 {
            self.waiting = VecDeque::new();
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut inner = self.lock();
        if let (Ok(offset), [byte], Some(uart)) = (u8::try_from(offset), data, &mut inner.uart) {
            *byte = uart.read(offset);
            inner.feed();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        if let (Ok(offset), [byte], Some(uart)) = (u8::try_from(offset), data, &mut inner.uart) {
            // Neither the line nor the output fails.
            let _ = uart.write(offset, *byte);
            inner.feed();
        }
    }
}

/// Writes to a descriptor that may be slow (a terminal, a pipe), waiting for it a bounded time.
/// Once it has been full for that long, output is lost without waiting until it takes some again.
#[derive(Debug)]
pub struct FdSink {
    fd: OwnedFd,
    patience_ms: i32,
    stuck: bool,
}

impl FdSink {
    /// Waits up to `patience_ms` milliseconds when the descriptor is full.
    pub fn new(fd: OwnedFd, patience_ms: u16) -> Self {
        Self {
            fd,
            patience_ms: patience_ms.into(),
            stuck: false,
        }
    }
}

impl Write for FdSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        let timeout = if self.stuck { 0 } else { self.patience_ms };
        // SAFETY: `poll` is one valid pollfd for the duration of the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, timeout) };
        self.stuck = ready <= 0;
        if ready < 0 {
            return Err(io::Error::last_os_error());
        }
        if ready == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // What poll calls writable takes this much without blocking, on pipes and terminals.
        let chunk = &data[..data.len().min(256)];
        // SAFETY: pointer and length are those of a live slice.
        let n = unsafe { libc::write(self.fd.as_raw_fd(), chunk.as_ptr().cast(), chunk.len()) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Serial, EventFd, Shared) {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let out = Shared::default();
        let serial = Serial::new(irq.try_clone().unwrap(), Box::new(out.clone()));
        (serial, irq, out)
    }

    fn get(serial: &Serial, offset: u64) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_sink_and_tail() {
        let (serial, _irq, out) = serial();
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*out.0.lock().unwrap(), b"hello");
        assert_eq!(serial.tail(), b"hello");
        for n in 0..70_000u32 {
            serial.write(0, &[n as u8]);
        }
        let tail = serial.tail();
        assert_eq!(tail.len(), TAIL);
        assert_eq!(*tail.last().unwrap(), 69_999u32 as u8);
        assert_eq!(serial.counters(), (70_005, 0));
    }

    #[test]
    fn more_input_than_the_fifo_holds_arrives_in_order() {
        let (serial, irq, _out) = serial();
        serial.write(1, &[1]);
        let input: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        assert_eq!(serial.enqueue_input(&input), 1000);
        assert!(irq.read().is_ok());
        let mut got = Vec::new();
        while get(&serial, 5) & 1 != 0 {
            got.push(get(&serial, 0));
        }
        assert_eq!(got, input);
        // And it is bounded.
        let flood = vec![0; 1 << 20];
        assert!(serial.enqueue_input(&flood) <= MAX_INPUT);
        assert!(serial.enqueue_input(&flood) <= FIFO);
    }

    #[test]
    fn state_round_trip() {
        let (serial, _irq, _out) = serial();
        serial.write(1, &[1]);
        serial.write(7, &[0x5a]);
        serial.enqueue_input(&[b'x'; 100]);
        let (other, irq, _out) = self::serial();
        other.restore(&serial.save()).unwrap();
        assert_eq!(other.save(), serial.save());
        assert!(irq.read().is_ok(), "a pending interrupt is raised again");
        assert_eq!(get(&other, 7), 0x5a);
        let mut state = serial.save();
        state["fifo"] = serde_json::json!(vec![0; 65]);
        assert!(other.restore(&state).is_err());
        state["version"] = 9.into();
        assert!(other.restore(&state).is_err());
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let (serial, _irq, out) = serial();
        serial.write(0, &[1, 2, 3, 4]);
        serial.write(u64::MAX, &[1]);
        let mut wide = [0xff; 8];
        serial.read(0, &mut wide);
        assert_eq!(wide, [0; 8]);
        assert!(out.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_stuck_sink_does_not_block() {
        let (reader, writer) = std::io::pipe().unwrap();
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let serial = Serial::new(irq, Box::new(FdSink::new(writer.into(), 1)));
        for _ in 0..100_000 {
            serial.write(0, b"x");
        }
        let (written, dropped) = serial.counters();
        assert_eq!(written, 100_000);
        assert!(dropped > 0 && dropped < written);
        drop(reader);
        serial.write(0, b"x");
    }
}
