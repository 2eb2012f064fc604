//! `vmmctl` on real KVM: programs of real images, as a user runs them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;

use bulkhead_tests::env::{self, PATIENCE};
use bulkhead_tests::process::Guard;
use bulkhead_tests::terminal::Terminal;
use sha2::{Digest, Sha256};

fn image(name: &str) -> PathBuf {
    bulkhead_fixtures::find_image(name)
        .unwrap()
        .unwrap_or_else(|| panic!("image {name} is missing: run `just fixtures`"))
        .oci_tar
}

fn vmmctl() -> Command {
    Command::new(env::vmmctl().unwrap())
}

/// Runs to the end, but not for ever.
fn finish(mut command: Command) -> Output {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    receiver.recv_timeout(PATIENCE).map_or_else(
        |_| {
            let _ = Command::new("kill").arg("-9").arg(pid.to_string()).status();
            panic!("{command:?} did not end within {PATIENCE:?}");
        },
        Result::unwrap,
    )
}

fn run(options: &[&str], image_name: &str, command: &[&str]) -> Output {
    let mut vmmctl = vmmctl();
    vmmctl
        .arg("run")
        .args(options)
        .arg(image(image_name))
        .arg("--")
        .args(command);
    vmmctl.stdin(Stdio::null());
    finish(vmmctl)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}: {}\n{}",
        output.status,
        stdout(output),
        stderr(output)
    );
    stdout(output)
}

/// One line that names the object, and the exit code of our own failures.
#[track_caller]
fn refused(output: &Output, names: &[&str]) {
    assert_eq!(output.status.code(), Some(125), "{}", stderr(output));
    let text = stderr(output);
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    for name in names {
        assert!(text.contains(name), "{text} lacks {name:?}");
    }
}

/// What a VM could leave on the host.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    mounts: Vec<String>,
    run_dirs: Vec<String>,
    links: Vec<String>,
    processes: usize,
    containers: usize,
}

fn host() -> Host {
    let names = |dir: &str| {
        let mut names: Vec<String> = fs::read_dir(dir)
            .map(|entries| {
                entries
                    .filter_map(|e| e.ok().map(|e| e.file_name().to_string_lossy().into_owned()))
                    .collect()
            })
            .unwrap_or_default();
        names.sort();
        names
    };
    Host {
        mounts: fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect(),
        run_dirs: names("/run/bulkhead/vms"),
        links: names("/sys/class/net"),
        processes: fs::read_dir("/proc")
            .unwrap()
            .filter_map(|e| fs::read_to_string(e.ok()?.path().join("comm")).ok())
            .filter(|comm| comm.trim() == "vmmctl")
            .count(),
        containers: names("/var/lib/bulkhead/containers").len(),
    }
}

#[test]
fn a_program_sees_our_kernel_and_its_image() {
    let output = run(
        &[],
        "busybox",
        &["sh", "-c", "uname -r; hostname; id -u; pwd; ls /bin/sh"],
    );
    let text = succeeded(&output);
    assert!(text.contains("-bulkhead"), "{text}");
    assert!(text.contains("/bin/sh"), "{text}");
}

#[test]
fn a_distributions_kernel_runs_a_container_too() {
    let (kernel, modules) = match env::host_kernel() {
        Ok(found) => found,
        Err(error) => return env::skip("a_distributions_kernel_runs_a_container_too", &error),
    };
    let dir = tempfile::tempdir().unwrap();
    let initramfs = dir.path().join("initramfs");
    let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../rootfs/initramfs"));
    let made = Command::new(script)
        .args([&modules, &env::agent().unwrap(), &initramfs])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    let volume = format!("{}:/vol", dir.path().display());
    let output = run(
        &[
            "--kernel",
            kernel.to_str().unwrap(),
            "--initramfs",
            initramfs.to_str().unwrap(),
            "--memory=512M",
            "--volume",
            &volume,
        ],
        "busybox",
        &[
            "sh",
            "-c",
            "uname -r; ls /modules /init; cp /etc/passwd /vol/out; exit 4",
        ],
    );
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(stdout(&output), release);
    assert!(dir.path().join("out").exists());
}

#[test]
fn exit_codes_are_passed_on() {
    for code in [0, 7] {
        let output = run(&[], "busybox", &["sh", "-c", &format!("exit {code}")]);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
    }
    // Killed from outside: the first process of a PID namespace cannot kill itself.
    let mut vm = Running::start("to-be-killed", &[], "while :; do sleep 1; done");
    succeeded(&vm.ctl("kill", &["-s=KILL"]));
    assert_eq!(vm.child.0.wait().unwrap().code(), Some(128 + 9));
    let missing = run(&[], "busybox", &["no-such-program"]);
    assert_eq!(missing.status.code(), Some(127), "{}", stderr(&missing));
    assert!(stderr(&missing).contains("no-such-program"));
    let not_executable = run(&[], "busybox", &["/etc/passwd"]);
    assert_eq!(
        not_executable.status.code(),
        Some(126),
        "{}",
        stderr(&not_executable)
    );
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let output = run(&[], "busybox", &["sh", "-c", "echo out; echo err >&2"]);
    assert_eq!(succeeded(&output), "out\n");
    assert_eq!(stderr(&output), "err\n");
}

#[test]
fn python_runs_threads_and_a_subprocess() {
    let output = run(
        &["--memory", "512M"],
        "python3",
        &["python3", "/app/job.py"],
    );
    let text = succeeded(&output);
    assert!(text.contains("job ok: 4 threads"), "{text}");
}

#[test]
fn options_reach_the_program() {
    let output = run(
        &[
            "--env",
            "COLOUR=blue",
            "--workdir",
            "/tmp",
            "--hostname",
            "tester",
            "--cpus",
            "2",
            "--user",
            "65534:65534",
        ],
        "busybox",
        &[
            "sh",
            "-c",
            "echo $COLOUR $(pwd) $(hostname) $(nproc) $(id -u):$(id -g)",
        ],
    );
    assert_eq!(succeeded(&output).trim(), "blue /tmp tester 2 65534:65534");
    let output = run(&["--read-only"], "busybox", &["sh", "-c", "touch /file"]);
    assert_ne!(output.status.code(), Some(0));
    assert!(
        stderr(&output).contains("Read-only file system"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_container_has_dockers_capabilities_and_a_read_only_proc_sys() {
    let script = "grep CapEff /proc/self/status; echo 1 > /proc/sys/kernel/panic";
    let output = run(&[], "busybox", &["sh", "-c", script]);
    let text = stdout(&output);
    assert!(text.contains("CapEff:\t00000000a80425fb"), "{text}");
    assert_ne!(output.status.code(), Some(0), "/proc/sys must be read-only");
    assert!(stderr(&output).contains("Read-only"), "{}", stderr(&output));
}

#[test]
fn every_form_of_an_image_runs() {
    let paths = bulkhead_fixtures::find_image("busybox").unwrap().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    let busybox = ["/usr/bin/busybox", "/bin/busybox"]
        .into_iter()
        .find(|p| Path::new(p).exists())
        .unwrap();
    fs::copy(busybox, root.join("bin/sh")).unwrap();
    for form in [&paths.layout, &paths.docker_tar, &root] {
        let mut command = vmmctl();
        command
            .arg("run")
            .arg(form)
            .args(["--", "/bin/sh", "-c", "echo it runs"]);
        command.stdin(Stdio::null());
        let output = finish(command);
        assert_eq!(succeeded(&output), "it runs\n", "{}", form.display());
    }
    // The image itself is not changed by what runs in it.
    assert!(!root.join("proc").exists() || fs::read_dir(root.join("proc")).unwrap().count() == 0);
}

#[test]
fn volumes_are_shared_both_ways_and_read_only_holds() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in"), "from the host\n").unwrap();
    let volume = format!("{}:/vol", dir.path().display());
    let script = "cat /vol/in; echo from the guest > /vol/out; chown 1234:4321 /vol/out; chmod 640 /vol/out; ln -s in /vol/link";
    let output = run(&["--volume", &volume], "busybox", &["sh", "-c", script]);
    assert_eq!(succeeded(&output), "from the host\n");
    let out = dir.path().join("out");
    assert_eq!(fs::read_to_string(&out).unwrap(), "from the guest\n");
    let metadata = fs::metadata(&out).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
    assert_eq!(metadata.permissions().mode() & 0o777, 0o640);
    assert_eq!(
        fs::read_link(dir.path().join("link")).unwrap(),
        Path::new("in")
    );

    let read_only = format!("{volume}:ro");
    let output = run(
        &["--volume", &read_only],
        "busybox",
        &["sh", "-c", "cat /vol/in; touch /vol/new"],
    );
    assert_ne!(output.status.code(), Some(0));
    assert_eq!(stdout(&output), "from the host\n");
    assert!(!dir.path().join("new").exists());
}

#[test]
fn a_symlink_in_a_volume_does_not_lead_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "secret of the host").unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    std::os::unix::fs::symlink(&secret, shared.join("absolute")).unwrap();
    std::os::unix::fs::symlink("../secret", shared.join("relative")).unwrap();
    let volume = format!("{}:/vol", shared.display());
    let output = run(
        &["--volume", &volume],
        "busybox",
        &[
            "sh",
            "-c",
            "cat /vol/absolute /vol/relative /vol/../secret; ls /vol/..; true",
        ],
    );
    assert!(
        !stdout(&output).contains("secret of the host"),
        "{}",
        stdout(&output)
    );
}

/// 500 MB that do not repeat, without holding them.
struct Pattern {
    state: u64,
    left: usize,
}

impl Pattern {
    fn new(bytes: usize) -> Self {
        Self {
            state: 0x9E37_79B9_7F4A_7C15,
            left: bytes,
        }
    }
}

impl Read for Pattern {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = buffer.len().min(self.left);
        for chunk in buffer[..len].chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            let bytes = self.state.to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        self.left -= len;
        Ok(len)
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

const HALF_GIGABYTE: usize = 500 << 20;

#[test]
fn half_a_gigabyte_goes_through_vsock_and_back() {
    let mut command = vmmctl();
    command
        .args(["run", "-i"])
        .arg(image("busybox"))
        .args(["--", "cat"]);
    let mut child = Guard(
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut input = child.0.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        let mut pattern = Pattern::new(HALF_GIGABYTE);
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = pattern.read(&mut buffer).unwrap();
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            input.write_all(&buffer[..n]).unwrap();
        }
        hash.finalize().to_vec()
    });
    let mut output = child.0.stdout.take().unwrap();
    let mut hash = Sha256::new();
    let mut total = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = output.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        total += n;
    }
    assert_eq!(total, HALF_GIGABYTE);
    assert_eq!(hex(&hash.finalize()), hex(&writer.join().unwrap()));
    assert!(child.0.wait().unwrap().success());
}

#[test]
fn half_a_gigabyte_goes_through_virtio_fs() {
    let dir = tempfile::tempdir().unwrap();
    let mut hash = Sha256::new();
    let mut file = fs::File::create(dir.path().join("in")).unwrap();
    let mut pattern = Pattern::new(HALF_GIGABYTE);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = pattern.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        file.write_all(&buffer[..n]).unwrap();
    }
    drop(file);
    let expected = hex(&hash.finalize());
    let volume = format!("{}:/vol", dir.path().display());
    let output = run(
        &["--volume", &volume],
        "busybox",
        &[
            "sh",
            "-c",
            "cat /vol/in > /vol/out && sync && wc -c < /vol/out",
        ],
    );
    assert_eq!(succeeded(&output).trim(), HALF_GIGABYTE.to_string());
    let mut hash = Sha256::new();
    let mut copy = fs::File::open(dir.path().join("out")).unwrap();
    std::io::copy(&mut copy, &mut hash).unwrap();
    assert_eq!(hex(&hash.finalize()), expected);
}

#[test]
fn an_interactive_session_behaves_like_a_terminal() {
    let mut command = vmmctl();
    command
        .args(["run", "-it"])
        .arg(image("busybox"))
        .args(["--", "sh"]);
    let mut terminal = Terminal::start(&mut command);
    terminal.resize(40, 123);
    terminal.expect("# ");
    terminal.type_in("echo answer=$((6*7)); tty\n");
    terminal.expect("answer=42");
    terminal.expect("/dev/pts/");
    terminal.resize(41, 99);
    terminal.type_in("until [ \"$(stty size)\" = '41 99' ]; do :; done; echo resized\n");
    terminal.expect("\nresized");
    // Ctrl-C ends the program in the foreground, not the shell and not the VM.
    // What says so is in the foreground already; a shell that has only forked is not.
    terminal.type_in("sh -c 'echo sleeping; exec sleep 1000'\n");
    terminal.expect("\nsleeping");
    terminal.type_in("\x03");
    terminal.expect("# ");
    terminal.type_in("echo still here\n");
    terminal.expect("\nstill here");
    terminal.type_in("exit 3\n");
    assert_eq!(terminal.wait(), Some(3));
}

/// A VM that runs until it is told to end.
struct Running {
    child: Guard,
    name: String,
}

impl Running {
    fn start(name: &str, options: &[&str], script: &str) -> Self {
        let mut command = vmmctl();
        command
            .args(["run", "--name", name])
            .args(options)
            .arg(image("busybox"))
            .args(["--", "sh", "-c"])
            .arg(format!("echo READY; {script}"));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut running = Self {
            child: Guard(child),
            name: name.to_owned(),
        };
        let mut output = running.child.0.stdout.take().unwrap();
        bulkhead_tests::process::wait_for_marker(&mut output, b"READY\n", PATIENCE).unwrap();
        // Whatever follows must find a reader.
        thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        running
    }

    fn ctl(&self, command: &str, more: &[&str]) -> Output {
        let mut vmmctl = vmmctl();
        vmmctl
            .arg(command)
            .args(more.iter().take_while(|a| a.starts_with('-')));
        vmmctl
            .arg(&self.name)
            .args(more.iter().skip_while(|a| a.starts_with('-')));
        vmmctl.stdin(Stdio::null());
        finish(vmmctl)
    }
}

#[test]
fn a_running_vm_can_be_looked_into_and_driven() {
    let mut vm = Running::start(
        "looked-into",
        &[],
        "trap 'exit 9' TERM; while :; do sleep 1; done",
    );
    let mut ps = vmmctl();
    ps.args(["ps", "--json"]);
    let listed = succeeded(&finish(ps));
    assert!(listed.contains("looked-into"), "{listed}");
    assert_eq!(succeeded(&vm.ctl("exec", &["cat", "/proc/1/comm"])), "sh\n");
    assert_eq!(
        vm.ctl("exec", &["sh", "-c", "exit 5"]).status.code(),
        Some(5)
    );
    let inspected = succeeded(&vm.ctl("inspect", &["--json"]));
    let value: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert!(value.to_string().contains("vsock"), "{inspected}");
    let boot = succeeded(&vm.ctl("inspect", &["--boot"]));
    assert!(boot.contains("agent answers"), "{boot}");
    let stats: serde_json::Value =
        serde_json::from_str(&succeeded(&vm.ctl("stats", &["--json"]))).unwrap();
    assert!(stats.to_string().contains("exits"), "{stats}");
    let registers = succeeded(&vm.ctl("inspect", &["--registers"]));
    assert!(registers.contains("rip"), "{registers}");
    let dir = tempfile::tempdir().unwrap();
    let core = dir.path().join("core");
    succeeded(&vm.ctl("dump", &[core.to_str().unwrap()]));
    assert!(fs::metadata(&core).unwrap().len() > 1 << 20);

    succeeded(&vm.ctl("pause", &[]));
    let paused = succeeded(&vm.ctl("inspect", &["--json"]));
    assert!(paused.contains("paused"), "{paused}");
    succeeded(&vm.ctl("resume", &[]));
    assert_eq!(
        succeeded(&vm.ctl("exec", &["echo", "goes on"])),
        "goes on\n"
    );
    succeeded(&vm.ctl("kill", &["-s=TERM"]));
    assert_eq!(vm.child.0.wait().unwrap().code(), Some(9));
}

#[test]
fn a_program_in_a_running_vm_gets_a_terminal_of_its_own() {
    let mut vm = Running::start(
        "with-terminals",
        &[],
        "trap 'exit 0' TERM; while :; do sleep 1; done",
    );
    let mut command = vmmctl();
    command.args(["exec", "-it", "-e", "WHO=me", "-w", "/tmp", &vm.name, "sh"]);
    let mut terminal = Terminal::start(&mut command);
    terminal.expect("# ");
    terminal.type_in("tty; echo $WHO:$PWD\n");
    terminal.expect("/dev/pts/");
    terminal.expect("\nme:/tmp");
    terminal.resize(17, 61);
    terminal.type_in("until [ \"$(stty size)\" = '17 61' ]; do :; done; echo resized\n");
    terminal.expect("\nresized");
    terminal.type_in("exit 6\n");
    assert_eq!(terminal.wait(), Some(6));

    // The guest's kernel echoes what is typed at its console; Ctrl-] leaves and nothing ends.
    let mut command = vmmctl();
    command.args(["console", &vm.name]);
    let mut console = Terminal::start(&mut command);
    console.expect("Ctrl-] leaves");
    console.type_in("marco\r");
    console.expect("marco");
    console.type_in("\x1d");
    assert_eq!(console.wait(), Some(0));
    assert_eq!(
        succeeded(&vm.ctl("exec", &["echo", "goes on"])),
        "goes on\n"
    );
    succeeded(&vm.ctl("kill", &["-s=TERM"]));
    assert_eq!(vm.child.0.wait().unwrap().code(), Some(0));
}

#[test]
fn completions_are_ones_that_the_shell_takes() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let mut command = vmmctl();
        command.args(["completions", shell]);
        let script = succeeded(&finish(command));
        for word in ["inspect", "hugepages", "wasm"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
        if shell == "bash" {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("vmmctl");
            fs::write(&file, &script).unwrap();
            // What pressing TAB after `vmmctl ins` does.
            let mut bash = Command::new("bash");
            bash.args(["--norc", "-c"]).arg(format!(
                ". {}; COMP_WORDS=(vmmctl ins); COMP_CWORD=1; _vmmctl vmmctl ins vmmctl; \
                 echo \"${{COMPREPLY[*]}}\"",
                file.display()
            ));
            assert_eq!(succeeded(&finish(bash)).trim(), "inspect");
        }
    }
}

#[test]
fn a_name_in_use_is_refused_and_an_unknown_one_named() {
    let mut vm = Running::start("taken", &[], "while :; do sleep 1; done");
    refused(&run(&["--name", "taken"], "busybox", &["true"]), &["taken"]);
    let mut unknown = vmmctl();
    unknown.args(["inspect", "takn"]);
    refused(&finish(unknown), &["takn", "taken"]);
    succeeded(&vm.ctl("stop", &["-t=1"]));
    assert!(vm.child.0.wait().unwrap().code().is_some_and(|c| c >= 128));
}

#[test]
fn signals_of_the_terminal_reach_the_program() {
    let mut vm = Running::start(
        "signalled",
        &[],
        "trap 'exit 21' INT; while :; do sleep 1; done",
    );
    let pid = nix::unistd::Pid::from_raw(vm.child.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(vm.child.0.wait().unwrap().code(), Some(21));
}

#[test]
fn nothing_is_left_behind_whatever_happens() {
    // The first run may unpack the image, which stays by intention.
    succeeded(&run(&[], "busybox", &["true"]));
    let before = host();
    run(&[], "busybox", &["sh", "-c", "exit 3"]);
    run(&[], "busybox", &["no-such-program"]);
    run(&["--memory", "16M"], "busybox", &["true"]);
    run(&["--volume", "/no/such/dir:/vol"], "busybox", &["true"]);
    run(&["--net", "tap"], "busybox", &["true"]);
    assert_eq!(host(), before);

    // Killed in the middle: the next vmmctl cleans up.
    let mut vm = Running::start("killed", &["--net", "tap"], "while :; do sleep 1; done");
    vm.child.0.kill().unwrap();
    vm.child.0.wait().unwrap();
    let mut ps = vmmctl();
    ps.arg("ps");
    let listed = succeeded(&finish(ps));
    assert!(!listed.contains("killed"), "{listed}");
    assert_eq!(host(), before);
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let before = host();
    let dir = tempfile::tempdir().unwrap();
    let not_an_image = dir.path().join("notes.tar");
    fs::write(&not_an_image, "these are notes").unwrap();
    let plain = |args: &[&str]| {
        let mut command = vmmctl();
        command.args(args).stdin(Stdio::null());
        finish(command)
    };
    refused(
        &plain(&["run", not_an_image.to_str().unwrap()]),
        &["notes.tar"],
    );
    refused(
        &plain(&["run", "/no/such/image.tar"]),
        &["/no/such/image.tar"],
    );
    fs::create_dir(dir.path().join("data")).unwrap();
    let typo = format!("{}/dta:/vol", dir.path().display());
    refused(
        &run(&["--volume", &typo], "busybox", &["true"]),
        &["dta", "did you mean", "data"],
    );
    refused(&run(&["--memory", "4M"], "busybox", &["true"]), &["memory"]);
    refused(
        &run(&["--memory", "900G"], "busybox", &["true"]),
        &["memory", "more than this host has"],
    );
    refused(
        &run(&["--kernel", "/no/kernel"], "busybox", &["true"]),
        &["/no/kernel"],
    );
    refused(
        &run(
            &["--kernel", not_an_image.to_str().unwrap()],
            "busybox",
            &["true"],
        ),
        &["notes.tar", "neither an ELF kernel"],
    );
    // A guest image without an agent: the kernel panics, and we say so.
    let empty = dir.path().join("empty.erofs");
    fs::write(&empty, vec![0; 1 << 20]).unwrap();
    refused(
        &run(&["--image", empty.to_str().unwrap()], "busybox", &["true"]),
        &["panicked"],
    );
    refused(
        &run(&["--user", "nobody-such"], "busybox", &["true"]),
        &["nobody-such"],
    );
    assert_eq!(host(), before);
}

#[test]
fn a_tap_network_reaches_the_host() {
    let output = run(
        &["--net", "tap"],
        "busybox",
        &[
            "sh",
            "-c",
            "ip route; gw=$(ip route | awk '/default/ { print $3 }'); ping -c 3 -W 20 $gw",
        ],
    );
    let text = succeeded(&output);
    assert!(text.contains(" 0% packet loss"), "{text}");

    // The same by the host's kernel: our process sees none of the packets.
    let mut vm = Running::start(
        "vhost",
        &["--net", "tap", "--vhost"],
        "trap 'exit 0' TERM; while :; do sleep 1; done",
    );
    let ping = "ping -c 3 -W 20 $(ip route | awk '/default/ { print $3 }')";
    let text = succeeded(&vm.ctl("exec", &["sh", "-c", ping]));
    assert!(text.contains(" 0% packet loss"), "{text}");
    let inspected = succeeded(&vm.ctl("inspect", &["--json"]));
    assert!(inspected.contains("\"vhost\": true"), "{inspected}");
    succeeded(&vm.ctl("kill", &["-s=TERM"]));
    assert_eq!(vm.child.0.wait().unwrap().code(), Some(0));
}

#[test]
fn doctor_says_what_the_host_has() {
    let mut command = vmmctl();
    command.args(["doctor", "--json"]);
    let output = finish(command);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value.to_string().contains("hardware"), "{value}");
}
