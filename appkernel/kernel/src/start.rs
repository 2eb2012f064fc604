//! From the first instruction in Rust to the first program, and the kernel's own end.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use appkernel_core::cmdline::{Device, Options};
use appkernel_hal as hal;

use crate::container::Container;
use crate::fs::file::{File, Files, Kind};
use crate::fs::fuse::Fuse;
use crate::fs::node::Node;
use crate::task::{self, Credentials, Task};
use crate::{agent, alarms, exec, fs, log, syscall, traps};

#[global_allocator]
static HEAP: hal::heap::Heap = hal::heap::Heap::new();

/// Marks in the VMM's boot timeline.
mod mark {
    pub const KERNEL: u8 = 1;
    pub const FIRST_PROGRAM: u8 = 2;
}

/// Called by the entry code with the address of the start info.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(start: u64) -> ! {
    hal::cpu::boot_mark(mark::KERNEL);
    let tsc = hal::cpu::tsc();
    hal::trap::init();
    hal::cpu::init();
    let info = match hal::boot::info(start) {
        Ok(info) => info,
        Err(reason) => panic!("{reason}"),
    };
    hal::frames::init(&info);
    hal::boot::drop_identity_map();
    hal::heap::ask_for_help(fs::fuse::shrink_in_need);
    hal::clock::init();
    hal::apic::init();
    let options = Options::parse(info.cmdline);
    syscall::trace(options.strace);
    exec::randomize(!options.norandmaps);
    hal::serial::Serial::enable_input();
    hal::apic::enable_pin(traps::SERIAL_PIN);
    let ram_end = info
        .ram
        .iter()
        .map(|r| r.1)
        .filter(|end| *end <= 3 << 30)
        .max();
    let machine = Machine {
        devices: options.devices.clone(),
        ram_end: ram_end.unwrap_or(0),
    };
    let Some(program) = options.run.first().cloned() else {
        serve(machine, (!options.quiet).then_some(tsc));
    };
    let share = machine.devices.iter().find(|device| {
        Fuse::tag_of(device, machine.ram_end).is_some_and(|tag| tag == options.root)
    });
    let Some(share) = share.and_then(|device| Fuse::probe(device, machine.ram_end)) else {
        fatal(format_args!(
            "no virtio-fs share {:?}: give the VM one, or name another by app.root=TAG",
            options.root
        ));
    };
    let container = Arc::new(Container::new(0, "", Node::Share(share.root()), false));
    container.mount_usual();
    if let Some(bytes) = options.memory {
        container.charge.limit(bytes.div_ceil(hal::PAGE));
    }
    let Some(thread) = task::init(&container, rest) else {
        fatal(format_args!("no memory for the kernel's own thread"));
    };
    let mut environment: Vec<Vec<u8>> =
        options.env.iter().map(|e| e.clone().into_bytes()).collect();
    if !options.env.iter().any(|e| e.starts_with("PATH=")) {
        environment
            .push(b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_vec());
    }
    let request = exec::Request {
        path: program.clone().into_bytes(),
        arguments: options.run.iter().map(|a| a.clone().into_bytes()).collect(),
        environment,
    };
    let credentials = Credentials::default();
    let context = exec::Context {
        container: &container,
        cwd: options.cwd.as_bytes(),
        credentials: &credentials,
        random: exec::is_random(0),
        may_become: true,
    };
    let image = match exec::load(&request, context) {
        Ok(image) => image,
        Err(e) => fatal(format_args!("{program}: {} ({})", e.name(), e.0)),
    };
    let console = Arc::new(File::new(Kind::Console, 2));
    let mut files = Files::default();
    for _ in 0..3 {
        if files.insert(Arc::clone(&console), 0, false).is_err() {
            fatal(format_args!("no memory for the first program"));
        }
    }
    drop(console);
    let new = task::New {
        container: &container,
        image,
        files,
        credentials,
        cwd: options.cwd.clone().into_bytes(),
        umask: 0o22,
        limits: task::Limits::default(),
        no_new_privileges: false,
    };
    let Ok(first) = Task::make(new) else {
        fatal(format_args!("no memory for the first program"));
    };
    task::begin(first.id);
    if !options.quiet {
        announce(tsc, "the first program");
    }
    drop((first, request, options, container));
    hal::cpu::boot_mark(mark::FIRST_PROGRAM);
    task::start(thread)
}

/// What the kernel found.
pub struct Machine {
    pub devices: Vec<Device>,
    /// Where memory ends and devices begin.
    pub ram_end: u64,
}

fn announce(tsc: u64, what: &str) {
    let cycles = hal::cpu::tsc() - tsc;
    let (total, free) = hal::frames::statistics();
    log!(
        "app kernel {}: {} MiB, {} KiB in use, {} k cycles to {what}",
        env!("CARGO_PKG_VERSION"),
        total / 256,
        (total - free) * 4,
        cycles / 1000
    );
}

/// The kernel's own thread when nobody but a program on the command line wants something.
extern "C" fn rest() -> ! {
    loop {
        let changes = alarms::changes();
        alarms::run();
        // Woken when a timer is set, or when one is due.
        let _ = task::wait_until(task::AGENT, alarms::next(), || {
            (alarms::changes() != changes).then_some(())
        });
    }
}

/// Waits for the host to say what to run.
fn serve(machine: Machine, announced: Option<u64>) -> ! {
    let root = Node::Memory(fs::memory::new(Some(0), 0o755));
    let container = Arc::new(Container::new(0, "", root, true));
    if let Err(reason) = agent::prepare(machine) {
        fatal(format_args!(
            "no program: name it by app.run=PROGRAM; {reason}"
        ));
    }
    let Some(thread) = task::init(&container, agent::run) else {
        fatal(format_args!("no memory for the kernel's own thread"));
    };
    if let Some(tsc) = announced {
        announce(tsc, "the agent");
    }
    drop(container);
    task::start(thread)
}

/// Ends the machine because the first program ended: `code` as a shell shows it.
pub fn ended(code: u8) -> ! {
    let (total, free) = hal::frames::statistics();
    log!(
        "{} KiB in use at the end; {} unknown calls",
        (total - free) * 4,
        syscall::unknown()
    );
    log!("first program ended: {code}");
    hal::cpu::reset()
}

/// Ends the machine with a message for whoever started it.
fn fatal(reason: core::fmt::Arguments<'_>) -> ! {
    log!("error: {reason}");
    log!("first program ended: 125");
    hal::cpu::reset()
}

static PANICKING: AtomicBool = AtomicBool::new(false);

/// A mistake of the kernel: everything known, then a reset, never a hang.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if PANICKING.swap(true, Ordering::Relaxed) {
        hal::cpu::reset();
    }
    log!("Kernel panic - not syncing: {info}");
    backtrace();
    syscall::print_last();
    hal::cpu::reset()
}

/// Prints return addresses by the chain of frame pointers, as far as it stays in the kernel.
pub fn backtrace() {
    let mut frame: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack)) };
    for _ in 0..24 {
        if frame < hal::DIRECT_MAP || !frame.is_multiple_of(8) {
            break;
        }
        let at: *const u64 = core::ptr::with_exposed_provenance(frame as usize);
        // SAFETY: a frame on a kernel stack: all code keeps frame pointers, the entry code ends
        // the chain with zero. Stacks lie in mapped memory.
        let (next, address) = unsafe { (at.read(), at.add(1).read()) };
        if address < hal::KERNEL_OFFSET {
            break;
        }
        log!("  at {address:#x}");
        if next <= frame {
            break;
        }
        frame = next;
    }
}
