//! The VM library on real KVM: boots, many VMs, bad guests, saved state, debugger.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_fixtures::tiny_guest::{self, Kind};
use bulkhead_tests::env::{self, PATIENCE};
use bulkhead_tests::process::Footprint;
use bulkhead_tests::screen::Screen;
use bulkhead_vmm::seccomp::Role;
use bulkhead_vmm::{
    Caching, DiskConfig, DiskSource, ShareConfig, Template, Vm, VmConfig, VmError, VmExit, VmState,
};

/// Tests that count what this process holds must not run beside others.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn put(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn tiny(&self, kind: Kind) -> PathBuf {
        self.put("tiny.elf", &tiny_guest::elf(kind))
    }

    fn initramfs(&self) -> PathBuf {
        self.put("bench.cpio", &bulkhead_fixtures::bench_initramfs())
    }
}

/// A Linux guest that says so when it reaches user space; with `reboot`, it then ends.
fn linux(files: &Files, screen: &Screen, reboot: bool) -> VmConfig {
    VmConfig {
        kernel: env::vmlinux().unwrap(),
        initramfs: Some(files.initramfs()),
        cmdline: if reboot { "-- reboot" } else { "" }.into(),
        memory_mib: 96,
        console: screen.console(),
        ..VmConfig::default()
    }
}

fn ended(vm: &Vm) -> VmExit {
    vm.wait_timeout(PATIENCE)
        .unwrap_or_else(|| panic!("{} did not end within {PATIENCE:?}", vm.id()))
}

#[test]
fn thirty_boots_in_a_row_leave_nothing_behind() {
    let _alone = alone();
    let files = Files::new();
    let mut before = None;
    for round in 0..31 {
        let screen = Screen::default();
        let vm = Vm::create(linux(&files, &screen, true)).unwrap();
        vm.start().unwrap();
        assert_eq!(ended(&vm), VmExit::Reset, "boot {round}: {}", screen.text());
        assert!(
            screen.text().contains(bulkhead_fixtures::BENCH_MARKER),
            "boot {round}"
        );
        drop(vm);
        let now = Footprint::now().unwrap();
        // The first boot may load what stays (KVM's own state, the allocator's arenas).
        assert_eq!(
            *before.get_or_insert_with(|| now.clone()),
            now,
            "boot {round}"
        );
    }
}

#[test]
fn eight_vms_at_once_in_one_process() {
    let _alone = alone();
    let files = Files::new();
    let before = Footprint::now().unwrap();
    let vms: Vec<_> = (0..8)
        .map(|index| {
            let screen = Screen::default();
            let mut config = linux(&files, &screen, false);
            config.id = format!("eight{index}");
            let vm = Vm::create(config).unwrap();
            vm.start().unwrap();
            (vm, screen)
        })
        .collect();
    for (_, screen) in &vms {
        screen.wait_for(bulkhead_fixtures::BENCH_MARKER);
    }
    let during = Footprint::now().unwrap();
    // One vCPU and no virtio device: one thread each.
    assert_eq!(during.threads, before.threads + 8);
    // One of them dies by force; the others do not notice.
    vms[3].0.stop();
    assert_eq!(vms[3].0.exit_reason(), Some(VmExit::Stopped));
    for (index, (vm, _)) in vms.iter().enumerate() {
        if index != 3 {
            assert_eq!(vm.exit_reason(), None);
        }
    }
    drop(vms);
    assert_eq!(Footprint::now().unwrap(), before);
}

#[test]
fn a_thread_that_leaves_its_role_ends_its_own_vm_only() {
    let _alone = alone();
    let files = Files::new();
    let share = tempfile::tempdir().unwrap();
    let start = |id: &str, seccomp: bool| {
        let screen = Screen::default();
        let mut config = linux(&files, &screen, false);
        config.id = id.into();
        config.seccomp = seccomp;
        config.rng = true;
        config.shares = vec![ShareConfig {
            tag: "files".into(),
            root: share.path().into(),
            read_only: true,
            caching: Caching::Never,
            upper_layers: false,
            fixed_top: false,
        }];
        let vm = Vm::create(config).unwrap();
        vm.start().unwrap();
        screen.wait_for(bulkhead_fixtures::BENCH_MARKER);
        vm
    };
    let neighbour = start("neighbour", true);
    for role in [Role::Vcpu, Role::Devices, Role::Files] {
        let vm = start("broken", true);
        let refused = vm.try_forbidden_call(role).unwrap().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{role:?}");
        match ended(&vm) {
            VmExit::Error(said) => assert!(said.contains("system call 41"), "{role:?}: {said}"),
            other => panic!("{role:?}: {other:?}"),
        }
    }
    assert_eq!(neighbour.exit_reason(), None);
    // Whoever looks for a fault can go without.
    let free = start("free", false);
    free.try_forbidden_call(Role::Devices).unwrap().unwrap();
    assert_eq!(free.exit_reason(), None);
}

#[test]
fn several_vcpus_come_up() {
    let _alone = alone();
    let files = Files::new();
    let screen = Screen::default();
    let mut config = linux(&files, &screen, true);
    config.vcpus = 4;
    let vm = Vm::create(config).unwrap();
    vm.start().unwrap();
    assert_eq!(ended(&vm), VmExit::Reset, "{}", screen.text());
    let text = screen.text();
    assert!(text.contains("smp: Brought up 1 node, 4 CPUs"), "{text}");
}

#[test]
fn a_bzimage_boots_by_the_64_bit_protocol() {
    let files = Files::new();
    let screen = Screen::default();
    let mut config = linux(&files, &screen, true);
    config.kernel = env::bzimage().unwrap();
    let vm = Vm::create(config).unwrap();
    vm.start().unwrap();
    assert_eq!(ended(&vm), VmExit::Reset, "{}", screen.text());
    assert!(screen.text().contains(bulkhead_fixtures::BENCH_MARKER));
}

#[test]
fn memory_above_4_gib_is_seen_by_the_guest() {
    let files = Files::new();
    let screen = Screen::default();
    let mut config = linux(&files, &screen, true);
    // The hole for devices ends at 4 GiB: 3584 MiB reach 512 MiB beyond it.
    config.memory_mib = 3584;
    let vm = Vm::create(config).unwrap();
    vm.start().unwrap();
    assert_eq!(ended(&vm), VmExit::Reset, "{}", screen.text());
    let text = screen.text();
    assert!(
        text.contains("[mem 0x0000000100000000-0x000000011fffffff] usable"),
        "{text}"
    );
}

#[test]
fn memory_comes_and_goes_while_a_guest_runs() {
    let files = Files::new();
    let screen = Screen::default();
    let config = VmConfig {
        room_mib: 256,
        ..linux(&files, &screen, false)
    };
    let vm = Vm::create(config).unwrap();
    vm.start().unwrap();
    screen.wait_for(bulkhead_fixtures::BENCH_MARKER);
    for wanted in [200 << 20, 64 << 20, 0] {
        vm.request_memory(wanted).unwrap();
        let begin = Instant::now();
        while vm.added_memory() != Some((wanted, wanted)) {
            assert!(
                begin.elapsed() < PATIENCE / 5,
                "{:?} of {wanted}: {}",
                vm.added_memory(),
                screen.text()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    vm.stop();
    assert_eq!(ended(&vm), VmExit::Stopped);
}

#[test]
fn a_triple_fault_is_named() {
    let files = Files::new();
    let vm = Vm::create(VmConfig {
        kernel: files.tiny(Kind::TripleFault),
        ..VmConfig::default()
    })
    .unwrap();
    vm.start().unwrap();
    let exit = ended(&vm);
    assert!(
        matches!(exit, VmExit::TripleFault { vcpu: 0, .. }),
        "{exit:?}"
    );
    assert!(exit.to_string().contains("triple fault"));
}

#[test]
fn a_guest_panic_is_told_with_its_message() {
    let screen = Screen::default();
    let vm = Vm::create(VmConfig {
        kernel: env::vmlinux().unwrap(),
        console: screen.console(),
        ..VmConfig::default()
    })
    .unwrap();
    vm.start().unwrap();
    let exit = ended(&vm);
    let VmExit::GuestPanic { message } = &exit else {
        panic!("{exit:?}: {}", screen.text());
    };
    assert!(message.contains("Unable to mount root fs"), "{message}");
}

#[test]
fn hanging_and_flooding_guests_are_stopped() {
    let _alone = alone();
    let files = Files::new();
    for kind in [Kind::HltForever, Kind::SpinForever, Kind::SerialFlood] {
        let before = Footprint::now().unwrap();
        let vm = Vm::create(VmConfig {
            kernel: files.tiny(kind),
            ..VmConfig::default()
        })
        .unwrap();
        vm.start().unwrap();
        assert_eq!(
            vm.wait_timeout(Duration::from_millis(500)),
            None,
            "{kind:?}"
        );
        assert!(vm.console_tail().len() <= 64 << 10, "{kind:?}");
        let start = Instant::now();
        vm.stop();
        assert!(start.elapsed() < Duration::from_secs(10), "{kind:?}");
        assert_eq!(vm.exit_reason(), Some(VmExit::Stopped), "{kind:?}");
        drop(vm);
        assert_eq!(Footprint::now().unwrap(), before, "{kind:?}");
    }
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let files = Files::new();
    let screen = Screen::default();
    let vm = Vm::create(linux(&files, &screen, true)).unwrap();
    vm.start().unwrap();
    screen.wait_for("Linux version");
    vm.pause().unwrap();
    let at = vm.registers().unwrap();
    let text = screen.text();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vm.registers().unwrap(), at);
    assert_eq!(screen.text(), text);
    vm.resume().unwrap();
    assert_eq!(ended(&vm), VmExit::Reset);
    assert!(screen.text().contains(bulkhead_fixtures::BENCH_MARKER));
}

/// A Linux guest with a device of several kinds.
fn with_devices(files: &Files, screen: &Screen, disk: &Path) -> VmConfig {
    VmConfig {
        vsock_cid: Some(3),
        rng: true,
        disks: vec![DiskConfig {
            source: DiskSource::Path(disk.to_owned()),
            read_only: true,
            serial: "saved".into(),
        }],
        ..linux(files, screen, true)
    }
}

/// Saves in the middle of the kernel's boot, with every device there is, and goes on in another
/// VM: each register that is forgotten shows.
#[test]
fn a_saved_vm_goes_on_in_another() {
    let files = Files::new();
    for vcpus in [1, 2] {
        let disk = files.put("disk", &vec![0; 1 << 20]);
        let config = |screen: &Screen| VmConfig {
            vcpus,
            ..with_devices(&files, screen, &disk)
        };
        let first_screen = Screen::default();
        let first = Vm::create(config(&first_screen)).unwrap();
        first.start().unwrap();
        // By then devices are probed and interrupts are on.
        first_screen.wait_for("virtio_blk");
        let state = first.save().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let memory = first.memory_file().try_clone().unwrap();
        drop(first);
        assert!(
            !first_screen
                .text()
                .contains(bulkhead_fixtures::BENCH_MARKER)
        );

        let state: VmState = serde_json::from_str(&text).unwrap();
        let second_screen = Screen::default();
        let second = Vm::restore(config(&second_screen), &state, memory).unwrap();
        second.start().unwrap();
        assert_eq!(
            ended(&second),
            VmExit::Reset,
            "{vcpus} vCPUs: {}",
            second_screen.text()
        );
        assert!(
            second_screen
                .text()
                .contains(bulkhead_fixtures::BENCH_MARKER)
        );
        assert!(!second_screen.text().contains("Linux version"));
    }
}

#[test]
fn a_template_begins_several_vms() {
    let files = Files::new();
    let disk = files.put("disk", &vec![0; 1 << 20]);
    let config = |screen: &Screen| with_devices(&files, screen, &disk);
    let screen = Screen::default();
    let first = Vm::create(config(&screen)).unwrap();
    first.start().unwrap();
    screen.wait_for("virtio_blk");
    let template = Template::of(&first).unwrap();
    drop(first);
    assert!(!screen.text().contains(bulkhead_fixtures::BENCH_MARKER));
    let most = config(&screen).memory_mib << 20;
    assert!(template.bytes() > 1 << 20 && template.bytes() < most / 2);

    let screens = [Screen::default(), Screen::default()];
    // At the same time: what one does is nothing to the other.
    let copies = screens
        .each_ref()
        .map(|screen| Vm::from_template(config(screen), &template).unwrap());
    for copy in &copies {
        copy.start().unwrap();
    }
    for (copy, screen) in copies.iter().zip(&screens) {
        assert_eq!(ended(copy), VmExit::Reset, "{}", screen.text());
        assert!(screen.text().contains(bulkhead_fixtures::BENCH_MARKER));
        assert!(!screen.text().contains("Linux version"));
    }
    let larger = VmConfig {
        memory_mib: 2 * config(&screen).memory_mib,
        ..config(&screen)
    };
    let error = Vm::from_template(larger, &template).unwrap_err();
    assert!(matches!(error, VmError::State(_)), "{error}");
}

#[test]
fn state_of_another_shape_is_refused() {
    let files = Files::new();
    let screen = Screen::default();
    let vm = Vm::create(linux(&files, &screen, false)).unwrap();
    vm.start().unwrap();
    let state = vm.save().unwrap();
    let memory = vm.memory_file().try_clone().unwrap();
    let mut config = linux(&files, &Screen::default(), false);
    config.vcpus = 2;
    let error = Vm::restore(config, &state, memory).unwrap_err();
    assert!(matches!(error, VmError::State(_)), "{error}");
}

#[test]
fn bad_files_and_values_are_refused_by_name() {
    let _alone = alone();
    let files = Files::new();
    let says = |config: VmConfig| Vm::create(config).unwrap_err().to_string();
    let base = || VmConfig {
        kernel: files.tiny(Kind::Marker),
        ..VmConfig::default()
    };
    let before = Footprint::now().unwrap();
    let missing = says(VmConfig {
        kernel: "/no/kernel".into(),
        ..base()
    });
    assert!(missing.starts_with("kernel /no/kernel: "), "{missing}");
    let text = files.put("notes.txt", b"not a kernel");
    assert!(
        says(VmConfig {
            kernel: text.clone(),
            ..base()
        })
        .contains("neither an ELF kernel")
    );
    let whole = fs::read(env::vmlinux().unwrap()).unwrap();
    let cut = files.put("cut", &whole[..whole.len() / 2]);
    assert!(
        says(VmConfig {
            kernel: cut,
            ..base()
        })
        .contains("truncated")
    );
    assert!(
        says(VmConfig {
            kernel: env::vmlinux().unwrap(),
            memory_mib: 16,
            ..base()
        })
        .contains("too small")
    );
    assert!(
        says(VmConfig {
            initramfs: Some("/no/initramfs".into()),
            ..base()
        })
        .contains("/no/initramfs")
    );
    assert!(
        says(VmConfig {
            disks: vec![DiskConfig {
                source: DiskSource::Path("/no/disk".into()),
                read_only: true,
                serial: String::new(),
            }],
            ..base()
        })
        .contains("/no/disk")
    );
    assert_eq!(Footprint::now().unwrap(), before);
}

#[test]
fn exits_are_counted_and_stages_stamped() {
    let files = Files::new();
    let vm = Vm::create(VmConfig {
        kernel: files.tiny(Kind::Marker),
        ..VmConfig::default()
    })
    .unwrap();
    vm.start().unwrap();
    assert_eq!(ended(&vm), VmExit::Reset);
    let stats = vm.stats();
    // One OUT for each letter of the marker and one for the reset.
    assert_eq!(stats.vcpus[0].io_out, tiny_guest::MARKER.len() as u64 + 1);
    assert_eq!(
        stats.kvm_vcpus.get("io_exits"),
        Some(&(tiny_guest::MARKER.len() as u64 + 1))
    );
    let stages: Vec<_> = stats.timeline.iter().map(|m| m.stage.as_str()).collect();
    assert_eq!(stages.first(), Some(&"start"));
    assert!(stages.contains(&"first instruction"), "{stages:?}");
    assert!(stats.timeline.is_sorted_by_key(|m| m.us));
}

#[test]
fn gdb_stops_steps_and_goes_on() {
    let files = Files::new();
    let screen = Screen::default();
    let socket = files.dir.path().join("gdb.sock");
    let mut config = linux(&files, &screen, true);
    config.gdb = Some(socket.display().to_string());
    let symbols = symbols();
    let vm = Arc::new(Vm::create(config).unwrap());
    let served = {
        let vm = Arc::clone(&vm);
        std::thread::spawn(move || vm.debug())
    };
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]);
    for command in [
        &format!("target remote {}", socket.display()),
        "hbreak start_kernel",
        "continue",
        "info symbol $rip",
        "printf \"before %lx\\n\", $rip",
        "stepi",
        "printf \"after %lx\\n\", $rip",
        "info threads",
        "delete",
        // Hit several times: GDB has to step over it each time.
        "hbreak process_one_work",
        "continue",
        "continue",
        "continue",
        "delete",
        "detach",
    ] {
        gdb.args(["-ex", command]);
    }
    let output = gdb.arg(&symbols).output().expect("gdb runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("start_kernel in section"), "{text}\n{errors}");
    let address = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            .unwrap_or_else(|| panic!("no {name:?}: {text}\n{errors}"))
    };
    let (before, after) = (address("before "), address("after "));
    assert!(after > before && after < before + 16, "{text}");
    let hits = text.matches("Breakpoint 2, 0x").count();
    assert_eq!(hits, 3, "{text}\n{errors}");
    served.join().unwrap().unwrap();
    assert_eq!(ended(&vm), VmExit::Reset, "{}", screen.text());
}

#[test]
fn gdb_reads_a_core_of_the_guest() {
    let files = Files::new();
    let screen = Screen::default();
    let vm = Vm::create(linux(&files, &screen, false)).unwrap();
    vm.start().unwrap();
    screen.wait_for(bulkhead_fixtures::BENCH_MARKER);
    let core = files.dir.path().join("core");
    vm.dump_core(&core).unwrap();
    let output = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", "x/s (char*)&linux_banner"])
        .arg(symbols())
        .arg(&core)
        .output()
        .expect("gdb runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("Linux version 6.12"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // The guest goes on after the dump.
    assert_eq!(vm.exit_reason(), None);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        fs::metadata(&core).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(
        vm.dump_core(&core).is_err(),
        "an existing file is not overwritten"
    );
}

fn symbols() -> PathBuf {
    let kernel = env::vmlinux().unwrap();
    let symbols = kernel.with_extension("symbols");
    let with_symbols = Path::new(&kernel).with_file_name("vmlinux.symbols");
    [with_symbols, symbols]
        .into_iter()
        .find(|path| path.exists())
        .expect("the kernel build keeps vmlinux.symbols")
}
