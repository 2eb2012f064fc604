//! Linux guests in our own VMM, on threads of this process.

pub mod files;
pub mod share;
pub mod tap;

use std::fmt;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bulkhead_vmm::{Console, DiskConfig, Template, Vm, VmConfig, VmError, VmExit};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::Value;

use super::console::{ConsoleHub, last_line};
use super::{EngineError, Sandbox};

/// A VM of this process.
pub struct MicroVm {
    vm: Arc<Vm>,
    console: ConsoleHub,
    stop_event: EventFd,
    /// Grace of the stop that was asked for, in ms plus one; 0: none was.
    stop_grace: AtomicU64,
}

impl fmt::Debug for MicroVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MicroVm")
            .field("id", &self.vm.id())
            .finish_non_exhaustive()
    }
}

impl MicroVm {
    /// Builds a VM; its console goes to `console`.
    ///
    /// # Errors
    /// As [`Vm::create`].
    pub fn create(config: VmConfig, console: ConsoleHub) -> Result<Self, EngineError> {
        Self::make(config, console, Vm::create)
    }

    /// Builds a VM that goes on where a template stood.
    ///
    /// # Errors
    /// As [`Vm::from_template`].
    pub fn copy(
        config: VmConfig,
        console: ConsoleHub,
        template: &Template,
    ) -> Result<Self, EngineError> {
        Self::make(config, console, |config| {
            Vm::from_template(config, template)
        })
    }

    fn make(
        mut config: VmConfig,
        console: ConsoleHub,
        make: impl FnOnce(VmConfig) -> Result<Vm, VmError>,
    ) -> Result<Self, EngineError> {
        config.console = Console::Writer(Box::new(console.clone()));
        let stop_event =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .map_err(|e| EngineError::io("eventfd")(e.into()))?;
        Ok(Self {
            vm: Arc::new(make(config)?),
            console,
            stop_event,
            stop_grace: AtomicU64::new(0),
        })
    }

    /// The VM itself.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Puts a disk into a spare slot of the running VM. Blocks shortly.
    ///
    /// # Errors
    /// As [`Vm::attach_disk`].
    pub fn attach_disk(&self, slot: usize, disk: DiskConfig) -> Result<(), EngineError> {
        Ok(self.vm.attach_disk(slot, disk)?)
    }

    /// Takes it out again. Blocks shortly.
    ///
    /// # Errors
    /// As [`Vm::detach_disk`].
    pub fn detach_disk(&self, slot: usize) -> Result<(), EngineError> {
        Ok(self.vm.detach_disk(slot)?)
    }

    /// Readable once someone has asked the owner to stop the VM.
    pub fn stop_event(&self) -> BorrowedFd<'_> {
        self.stop_event.as_fd()
    }

    /// The grace of the stop that was asked for, once.
    pub fn take_stop(&self) -> Option<Duration> {
        let _ = self.stop_event.read();
        match self.stop_grace.swap(0, Ordering::AcqRel) {
            0 => None,
            ms => Some(Duration::from_millis(ms - 1)),
        }
    }

    /// The error for a guest that ended by itself.
    pub fn ended(&self, during: &'static str) -> EngineError {
        let exit = self.vm.exit_reason();
        // A panic's message says it all.
        let console = match exit {
            Some(VmExit::GuestPanic { .. }) => String::new(),
            _ => last_line(&self.vm.console_tail()),
        };
        let reason = exit.map_or_else(|| "unknown reason".to_owned(), |e| e.to_string());
        EngineError::GuestEnded {
            during,
            remedy: remedy(&reason),
            reason,
            console,
        }
    }

    /// The error for a guest that does not answer.
    pub fn hangs(&self, during: &'static str, waited: Duration) -> EngineError {
        EngineError::GuestHangs {
            during,
            seconds: waited.as_secs(),
            console: last_line(&self.vm.console_tail()),
        }
    }
}

/// What a user can do about the ends that have one likely cause.
fn remedy(reason: &str) -> &'static str {
    if reason.contains("Requested init") || reason.contains("No working init") {
        "; the guest image holds no agent this kernel can run: give another with --image"
    } else if reason.contains("Unable to mount root fs") {
        "; the guest has no root file system it can read: give an erofs image with --image, or \
         with boot --initramfs or --disk and root= in --cmdline"
    } else if reason.contains("out of memory") || reason.contains("System is deadlocked on memory")
    {
        "; give it more with --memory"
    } else {
        ""
    }
}

/// Types what arrives on the guest's console until the stream or the VM ends.
fn type_on(vm: &Weak<Vm>, mut stream: UnixStream) {
    // The console's own writes made it non-blocking.
    let mut buffer = [0u8; 256];
    loop {
        let n = match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::NONE);
                continue;
            }
            Err(_) => return,
        };
        let Some(vm) = vm.upgrade() else { return };
        vm.console_input(buffer.get(..n).unwrap_or_default());
    }
}

fn io_value(what: &'static str) -> impl FnOnce(serde_json::Error) -> EngineError {
    move |e| EngineError::io(what)(e.into())
}

impl Sandbox for MicroVm {
    fn id(&self) -> String {
        self.vm.id().to_owned()
    }

    fn inspect(&self) -> Result<Value, EngineError> {
        Ok(self.vm.inspect())
    }

    fn stats(&self) -> Result<Value, EngineError> {
        serde_json::to_value(self.vm.stats()).map_err(io_value("statistics"))
    }

    fn registers(&self) -> Result<Value, EngineError> {
        Ok(self.vm.registers()?)
    }

    fn pause(&self) -> Result<(), EngineError> {
        Ok(self.vm.pause()?)
    }

    fn resume(&self) -> Result<(), EngineError> {
        Ok(self.vm.resume()?)
    }

    fn dump(&self, path: &Path) -> Result<(), EngineError> {
        Ok(self.vm.dump_core(path)?)
    }

    fn stop(&self, grace: Duration) -> Result<(), EngineError> {
        let ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX - 1);
        self.stop_grace
            .store(ms.saturating_add(1), Ordering::Release);
        self.stop_event
            .write(1)
            .map_err(|e| EngineError::io("asking for a stop")(e.into()))?;
        Ok(())
    }

    fn connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, EngineError> {
        let no_device = || {
            std::io::Error::new(
                std::io::ErrorKind::Unsupported,
                "the VM has no vsock device",
            )
        };
        let what = format!("VM {}: port {port}", self.vm.id());
        match self.vm.vsock() {
            Some(vsock) => vsock.connect(port, timeout).map_err(EngineError::io(what)),
            None => Err(EngineError::io(what)(no_device())),
        }
    }

    fn console(&self) -> Result<UnixStream, EngineError> {
        let failed = || EngineError::io(format!("VM {}: console", self.vm.id()));
        let (ours, theirs) = UnixStream::pair().map_err(failed())?;
        let tail = self.vm.console_tail();
        // The tail may be longer than a socket buffer, and the reader reads only after we return.
        let start = tail.len().saturating_sub(32 << 10);
        let number = self
            .console
            .attach(
                ours.try_clone().map_err(failed())?,
                tail.get(start..).unwrap_or_default(),
            )
            .map_err(failed())?;
        let vm = Arc::downgrade(&self.vm);
        let hub = self.console.clone();
        super::agent::spawn_brief("console", move || {
            type_on(&vm, ours);
            hub.detach(number);
        })?;
        Ok(theirs)
    }
}
