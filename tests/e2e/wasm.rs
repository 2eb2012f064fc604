//! `vmmctl wasm run` as a user runs it: files, images, real programs, hostile ones. Runs anywhere:
//! WebAssembly needs no KVM.

#[path = "wasm/daemon.rs"]
mod daemon;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_fixtures::wasm;
use bulkhead_tests::env::{self, PATIENCE};
use bulkhead_tests::process::Guard;
use bulkhead_tests::wasm::{oci_artifact, wit};

/// A store of its own for each test, so that nothing is found compiled by accident.
struct Place(tempfile::TempDir, PathBuf);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        Self(dir, store)
    }

    /// With a store that is kept: compiling a Python takes longer than all else together.
    fn for_large_programs() -> Self {
        let store = bulkhead_fixtures::cache_dir().unwrap().join("wasm-store");
        fs::create_dir_all(&store).unwrap();
        Self(tempfile::tempdir().unwrap(), store)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn vmmctl(&self) -> Command {
        let mut command = Command::new(env::vmmctl().unwrap());
        command
            .args(["wasm", "run"])
            .env("BULKHEAD_ROOT", &self.1)
            .env("BULKHEAD_RUN", self.path("run"));
        command
    }

    /// A module from text.
    fn wat(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, wat::parse_str(text).unwrap()).unwrap();
        path
    }
}

fn finish(mut command: Command) -> Output {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    receiver.recv_timeout(PATIENCE).map_or_else(
        |_| {
            let _ = Command::new("kill").arg("-9").arg(pid.to_string()).status();
            panic!("{command:?} did not end within {PATIENCE:?}");
        },
        Result::unwrap,
    )
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const C: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) printf("argument %s\n", argv[i]);
    const char *who = getenv("WHO");
    if (who) printf("WHO=%s\n", who);
    char line[100];
    FILE *f = fopen("/data/note", "r");
    if (f && fgets(line, sizeof line, f)) printf("note: %s", line);
    f = fopen("/data/out", "w");
    if (!f) { perror("out"); return 3; }
    fputs("written by C\n", f);
    fclose(f);
    if (fgets(line, sizeof line, stdin)) printf("input: %s", line);
    return 42;
}
"#;

#[test]
fn a_c_program_with_arguments_environment_volume_and_input() {
    let place = Place::new();
    let program = wasm::compile_c("hello.wasm", C).unwrap();
    let data = place.path("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("note"), "from the host\n").unwrap();
    let volume = format!("{}:/data", data.display());
    let mut command = place.vmmctl();
    command
        .args(["-i", "-e", "WHO=me", "-v", &volume])
        .arg(&program)
        .args(["--", "one", "two words"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"typed in\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(42), "{}", text(&output.stderr));
    assert_eq!(
        text(&output.stdout),
        "argument one\nargument two words\nWHO=me\nnote: from the host\ninput: typed in\n"
    );
    assert_eq!(
        fs::read_to_string(data.join("out")).unwrap(),
        "written by C\n"
    );
    // The same, read-only: the program sees an error and says so.
    let mut command = place.vmmctl();
    command.args(["-v", &format!("{volume}:ro")]).arg(&program);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("out:"), "{output:?}");
}

#[test]
fn cpython_runs_a_script_with_files() {
    let place = Place::for_large_programs();
    let data = place.path("data");
    fs::create_dir(&data).unwrap();
    fs::write(
        data.join("job.py"),
        "import json, sys, hashlib, pathlib, os\n\
         rows = [json.loads(line) for line in open('/data/rows.jsonl')]\n\
         total = sum(row['n'] for row in rows)\n\
         pathlib.Path('/data/result.txt').write_text(f'{total}\\n')\n\
         print(sys.version.split()[0], total, hashlib.sha256(b'x').hexdigest()[:8])\n\
         try:\n    open('/etc/passwd')\nexcept OSError as e:\n    print('no passwd:', type(e).__name__)\n\
         try:\n    os.symlink('/etc/passwd', '/data/link'); open('/data/link')\nexcept OSError:\n    print('no way out')\n\
         sys.exit(9)\n",
    )
    .unwrap();
    let rows: String = (0..1000).map(|n| format!("{{\"n\": {n}}}\n")).collect();
    fs::write(data.join("rows.jsonl"), rows).unwrap();
    let mut command = place.vmmctl();
    command
        .args(["-v", &format!("{}:/data", data.display())])
        .arg(wasm::python().unwrap())
        .args(["--", "/data/job.py"]);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    let out = text(&output.stdout);
    assert!(out.starts_with("3.12.0 499500 2d711642\n"), "{out}");
    assert!(
        out.contains("no passwd:") && out.contains("no way out"),
        "{out}"
    );
    assert_eq!(
        fs::read_to_string(data.join("result.txt")).unwrap(),
        "499500\n"
    );
}

#[test]
fn flite_makes_a_wav() {
    let place = Place::for_large_programs();
    let data = place.path("data");
    fs::create_dir(&data).unwrap();
    let mut command = place.vmmctl();
    command
        .args(["-v", &format!("{}:/data", data.display())])
        .arg(wasm::flite().unwrap())
        .args(["--", "-t", "a wall around each", "-o", "/data/speech.wav"]);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let wav = fs::read(data.join("speech.wav")).unwrap();
    assert!(wav.len() > 10_000, "{} bytes", wav.len());
    assert_eq!((&wav[..4], &wav[8..12]), (&b"RIFF"[..], &b"WAVE"[..]));
}

/// It is given relative paths, so its directory is the one it starts in.
#[test]
fn resvg_draws_a_picture() {
    const SVG: &str = r#"<svg xmlns="http://www.w3.org/2000/svg" width="100" height="80">
        <rect width="60" height="40" fill="red"/><circle cx="60" cy="50" r="20"/></svg>"#;
    let place = Place::for_large_programs();
    let data = place.path("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("in.svg"), SVG).unwrap();
    let mut command = place.vmmctl();
    command
        .args(["-v", &format!("{}:/", data.display())])
        .arg(wasm::resvg().unwrap())
        .args(["--", "in.svg", "out.png"]);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let png = fs::read(data.join("out.png")).unwrap();
    assert_eq!(
        (&png[..8], &png[12..16]),
        (&b"\x89PNG\r\n\x1a\n"[..], &b"IHDR"[..])
    );
    assert_eq!(
        (&png[16..20], &png[20..24]),
        (&[0, 0, 0, 100][..], &[0, 0, 0, 80][..])
    );
}

/// A free port; nobody else takes it in the moment until it is used.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn request(address: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn until_answered(address: &str, child: &mut Child) -> String {
    let begin = Instant::now();
    loop {
        match request(address, "/first?q=1") {
            Ok(answer) => return answer,
            Err(e) => {
                assert!(child.try_wait().unwrap().is_none(), "the server ended: {e}");
                assert!(begin.elapsed() < PATIENCE, "{e}");
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn an_http_component_in_python_answers_and_ends_when_asked() {
    let place = Place::for_large_programs();
    let program = wasm::python_http(&wit().unwrap()).unwrap();
    let address = free_address();
    let mut command = place.vmmctl();
    command
        .args(["--http", &address])
        .arg(&program)
        .stdout(Stdio::null());
    let mut server = Guard(command.spawn().unwrap());
    let answer = until_answered(&address, &mut server.0);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("python answers /first?q=1"), "{answer}");
    thread::scope(|scope| {
        for n in 0..8 {
            let address = &address;
            scope.spawn(move || {
                let answer = request(address, &format!("/{n}")).unwrap();
                assert!(answer.contains(&format!("answers /{n}\n")), "{answer}");
            });
        }
    });
    let pid = server.0.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

#[test]
fn an_http_program_without_an_address_says_what_to_do() {
    let place = Place::for_large_programs();
    let mut command = place.vmmctl();
    command.arg(wasm::python_http(&wit().unwrap()).unwrap());
    let output = finish(command);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("--http"), "{output:?}");
}

#[test]
fn artifacts_and_root_filesystems() {
    let place = Place::new();
    let exit7 = wat::parse_str(
        r#"(module
          (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          (memory (export "memory") 1)
          (func (export "other") (call $exit (i32.const 9)))
          (func (export "_start") (call $exit (i32.const 7))))"#,
    )
    .unwrap();
    let run = |image: &str, more: &[&str]| {
        let mut command = place.vmmctl();
        command.arg(image).args(more);
        let output = finish(command);
        (output.status.code(), text(&output.stderr))
    };
    for (name, media_type) in [
        ("v1", "application/vnd.wasm.content.layer.v1+wasm"),
        ("plain", "application/wasm"),
    ] {
        let layout = place.path(name);
        oci_artifact(&layout, media_type, &exit7).unwrap();
        let layout = layout.display().to_string();
        assert_eq!(run(&layout, &[]), (Some(7), String::new()), "{name}");
        assert_eq!(run(&layout, &[]), (Some(7), String::new()), "{name} again");
        assert_eq!(run(&format!("{layout}#other"), &[]).0, Some(9));
    }
    // A damaged module is no program.
    let layout = place.path("damaged");
    oci_artifact(&layout, "application/wasm", &exit7).unwrap();
    let blobs = layout.join("blobs/sha256");
    for blob in fs::read_dir(blobs).unwrap().flatten() {
        let bytes = fs::read(blob.path()).unwrap();
        if bytes == exit7 {
            let mut damaged = bytes;
            damaged[20] ^= 1;
            fs::write(blob.path(), damaged).unwrap();
        }
    }
    fs::remove_dir_all(place.path("store/modules")).unwrap();
    let (code, error) = run(&layout.display().to_string(), &[]);
    assert_eq!(code, Some(125));
    assert!(error.contains("damaged"), "{error}");
    // A root filesystem: the program is named by the command, links stay inside.
    let root = place.path("root");
    fs::create_dir_all(root.join("app")).unwrap();
    fs::write(root.join("app/seven.wasm"), &exit7).unwrap();
    std::os::unix::fs::symlink("/app/seven.wasm", root.join("seven")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("out")).unwrap();
    let root = root.display().to_string();
    assert_eq!(run(&root, &["--", "/app/seven.wasm"]).0, Some(7));
    assert_eq!(run(&root, &["--", "/seven#other"]).0, Some(9));
    let (code, error) = run(&root, &["--", "/out"]);
    assert_eq!(code, Some(127), "{error}");
    let (code, error) = run(&root, &["--", "/nothing.wasm"]);
    assert_eq!(code, Some(127), "{error}");
}

/// An image may hold a node of the host's disk; the program runs on the host's own kernel.
#[test]
fn devices_of_an_image_cannot_be_opened() {
    let place = Place::new();
    let program = wasm::compile_c(
        "open.wasm",
        "#include <stdio.h>\nint main(int c, char **v) { return fopen(v[1], \"r\") ? 0 : 5; }\n",
    )
    .unwrap();
    let root = place.path("root");
    fs::create_dir(&root).unwrap();
    fs::copy(program, root.join("open.wasm")).unwrap();
    fs::write(root.join("file"), "").unwrap();
    nix::sys::stat::mknod(
        &root.join("null"),
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::from_bits_truncate(0o666),
        libc::makedev(1, 3),
    )
    .unwrap();
    // The kernel that runs the test lets us open it; so only the sandbox can refuse.
    fs::File::open(root.join("null")).unwrap();
    for (options, path, code) in [
        (&[][..], "/file", 0),
        (&[], "/null", 5),
        (&["--read-only"], "/file", 0),
        (&["--read-only"], "/null", 5),
    ] {
        let mut command = place.vmmctl();
        command
            .args(options)
            .arg(&root)
            .args(["--", "/open.wasm", path]);
        let output = finish(command);
        assert_eq!(output.status.code(), Some(code), "{path}: {output:?}");
    }
}

#[test]
fn errors_are_one_line_and_say_what_to_do() {
    let place = Place::new();
    let run = |args: &[&str]| {
        let mut command = place.vmmctl();
        command.args(args);
        let output = finish(command);
        (output.status.code(), text(&output.stderr))
    };
    let (code, error) = run(&["/nowhere/x.wasm"]);
    assert_eq!(code, Some(125));
    assert!(error.contains("no such file"), "{error}");
    let (code, error) = run(&["/bin/true"]);
    assert_eq!(code, Some(125), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let trap = place.wat(
        "trap.wasm",
        r#"(module (func $deep (unreachable)) (func (export "_start") (call $deep)))"#,
    );
    let (code, error) = run(&[&trap.display().to_string()]);
    assert_eq!(code, Some(134));
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains("unreachable"), "{error}");
    let (_, error) = run(&["--verbose", &trap.display().to_string()]);
    assert!(error.contains("at deep"), "{error}");
    // Its core, but none of a program that ends by itself.
    let core = place.path("core");
    let core_arg = core.display().to_string();
    let (code, error) = run(&["--core-dump", &core_arg, &trap.display().to_string()]);
    assert_eq!(code, Some(134), "{error}");
    let bytes = fs::read(&core).unwrap();
    assert!(bytes.starts_with(b"\0asm"));
    for section in [&b"corestack"[..], b"coremodules"] {
        assert!(bytes.windows(section.len()).any(|w| w == section));
    }
    fs::remove_file(&core).unwrap();
    let fine = place.wat("fine.wasm", r#"(module (func (export "_start")))"#);
    let (code, error) = run(&["--core-dump", &core_arg, &fine.display().to_string()]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert!(!core.exists());
    let bomb = place.wat(
        "bomb.wasm",
        r#"(module (memory 1) (func (export "_start")
          (loop $l (if (i32.eq (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))
          (br $l))))"#,
    );
    let (code, error) = run(&["--memory", "16M", &bomb.display().to_string()]);
    assert_eq!(code, Some(137));
    assert!(
        error.contains("out of memory") && error.contains("--memory"),
        "{error}"
    );
    let spin = place.wat(
        "loop.wasm",
        r#"(module (func (export "_start") (loop $l (br $l))))"#,
    );
    let begin = Instant::now();
    let (code, error) = run(&["--timeout", "0.3", &spin.display().to_string()]);
    assert_eq!(code, Some(124), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(30));
    let (code, error) = run(&[&format!("{}#nope", spin.display())]);
    assert_eq!(code, Some(127));
    assert!(
        error.contains("nope") && error.contains("_start"),
        "{error}"
    );
}

#[test]
fn what_a_program_costs_is_bounded() {
    let place = Place::new();
    let spin = place.wat(
        "loop.wasm",
        r#"(module (func (export "_start") (loop $l (br $l))))"#,
    );
    let report = place.path("report.json");
    let run = |args: &[&str]| {
        let mut command = place.vmmctl();
        command.args(args).arg("--report").arg(&report).arg(&spin);
        let output = finish(command);
        (output.status.code(), text(&output.stderr))
    };
    // The compiler, in a process of its own.
    let (code, error) = run(&["--compile-memory", "1M"]);
    assert_eq!(code, Some(125), "{error}");
    assert!(
        error.contains("more memory than 1 MiB (--compile-memory"),
        "{error}"
    );
    // The program's instructions.
    let (code, error) = run(&["--fuel", "100000"]);
    assert_eq!(code, Some(137), "{error}");
    assert!(error.contains("fuel"), "{error}");
    let value: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(value["reason"], "fuel");
}

#[test]
fn ctrl_c_ends_a_loop() {
    let place = Place::new();
    let spin = place.wat(
        "loop.wasm",
        r#"(module
          (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (data (i32.const 64) "up\n")
          (func (export "_start")
            (i32.store (i32.const 0) (i32.const 64))
            (i32.store (i32.const 4) (i32.const 3))
            (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
            (loop $l (br $l))))"#,
    );
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut command = place.vmmctl();
        command.arg(&spin).stdout(Stdio::piped());
        let mut child = Guard(command.spawn().unwrap());
        let mut up = [0; 3];
        child
            .0
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut up)
            .unwrap();
        let pid = child.0.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.0.wait().unwrap().code(), Some(code));
    }
}

#[test]
fn the_report_tells_what_was_used() {
    let place = Place::new();
    let grow = place.wat(
        "grow.wasm",
        r#"(module (memory 1) (func (export "_start") (drop (memory.grow (i32.const 31)))))"#,
    );
    let report = place.path("report.json");
    let run = || {
        let mut command = place.vmmctl();
        command.arg("--report").arg(&report).arg(&grow);
        assert_eq!(finish(command).status.code(), Some(0));
        let value: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
        value
    };
    let value = run();
    assert_eq!(value["sandbox"], "wasm");
    assert_eq!(value["reason"], "exited");
    assert_eq!(value["memory_peak_bytes"], 32 << 16);
    assert!(has_code(&place.path("store")));
}

fn has_code(store: &Path) -> bool {
    fs::read_dir(store.join("wasm-code"))
        .unwrap()
        .flatten()
        .any(|e| e.path().extension().is_some_and(|x| x == "cwasm"))
}

/// Sockets: the host's loopback cannot be reached without asking for the host's network.
#[test]
fn no_network_unless_asked_for() {
    let place = Place::for_large_programs();
    // A p1 program has no way to make a socket at all; CPython says so when it tries.
    let mut command = place.vmmctl();
    command.arg(wasm::python().unwrap()).args([
        "--",
        "-c",
        "try:\n import socket\n socket.create_connection(('127.0.0.1', 22))\nexcept Exception as e:\n print('refused:', type(e).__name__)",
    ]);
    let output = finish(command);
    assert!(
        text(&output.stdout).starts_with("refused:"),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

/// A program's own sockets, with the network of the host and without any.
#[test]
fn a_command_connects_where_it_may() {
    let place = Place::new();
    let program = bulkhead_fixtures::component::ask().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:8081").unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 19];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(b"an answer\n").unwrap();
        request
    });
    let mut command = place.vmmctl();
    command.arg(&program);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let mut command = place.vmmctl();
    command.args(["--net", "host"]).arg(&program);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stdout), "an answer\n");
    assert_eq!(&server.join().unwrap(), b"GET /x HTTP/1.0\r\n\r\n");
}

/// A network namespace of its own with its loopback up. Needs root, as all of the network does.
fn namespace() -> std::os::fd::OwnedFd {
    thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("a network namespace (run the tests as root)");
        loopback_up();
        fs::File::open("/proc/thread-self/ns/net").unwrap().into()
    })
    .join()
    .unwrap()
}

fn loopback_up() {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: an ifreq of zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = (*from).try_into().unwrap();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).unwrap();
    // SAFETY: the request is ours, its name ends with a zero, and the kernel only reads it.
    let result = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SIOCSIFFLAGS,
            &raw const request,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn in_namespace<T: Send>(fd: &std::os::fd::OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                nix::sched::setns(fd, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

#[test]
fn sockets_are_the_pods_and_nobody_elses() {
    use bulkhead_wasm::{
        ContainerConfig, Engine, EngineConfig, HttpConfig, Network, Pod, PodConfig, Source,
    };
    let engine = Engine::new(&EngineConfig::default()).unwrap();
    let component = bulkhead_tests::wasm::http_component(&wit().unwrap()).unwrap();
    let program = engine
        .load(Source::Bytes {
            name: "http",
            bytes: &component,
        })
        .unwrap();
    let fd = namespace();
    let pod = Pod::new(
        &engine,
        PodConfig {
            network: Network::Namespace(fd.try_clone().unwrap()),
            ..PodConfig::default()
        },
    );
    let address = "127.0.0.1:18080";
    let mut config = ContainerConfig::new("c", program);
    config.http = HttpConfig {
        listen: address.parse().unwrap(),
        threads: 2,
        ..HttpConfig::default()
    };
    let container = pod.create(config).unwrap();
    container.start().unwrap();
    let begin = Instant::now();
    let answer = loop {
        match in_namespace(&fd, || request(address, "/")) {
            Ok(answer) => break answer,
            Err(e) => assert!(begin.elapsed() < PATIENCE, "{e}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    assert!(
        answer.contains(bulkhead_tests::wasm::HELLO_BODY),
        "{answer}"
    );
    // The same address of the host is another place.
    let refused = request(address, "/").expect_err("the host's loopback");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    // A program that connects finds who listens in its pod, not who listens on the host.
    let ask = engine
        .load(Source::File(&bulkhead_fixtures::component::ask().unwrap()))
        .unwrap();
    let asked = || {
        let container = pod
            .create(ContainerConfig::new("ask", ask.clone()))
            .unwrap();
        container.start().unwrap();
        container.wait_for(PATIENCE).expect("ends").code
    };
    assert_eq!(asked(), 1);
    let listener = in_namespace(&fd, || {
        std::net::TcpListener::bind("127.0.0.1:8081").unwrap()
    });
    let server = thread::spawn(move || drop(listener.accept().unwrap()));
    assert_eq!(asked(), 0);
    server.join().unwrap();
    // Many at once: each has an instance of its own, and none is left.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                in_namespace(&fd, || {
                    for _ in 0..50 {
                        assert!(request(address, "/").unwrap().starts_with("HTTP/1.1 200"));
                    }
                });
            });
        }
    });
    container.signal(15).unwrap();
    let exit = container.wait_for(PATIENCE).expect("ends");
    assert_eq!(exit.code, 0, "{exit:?}");
    assert_eq!(container.stats().instances, 0);
    assert_eq!(pod.memory().used(), 0);
}
