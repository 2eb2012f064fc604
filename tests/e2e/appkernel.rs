//! The app kernel on real KVM: ordinary programs of ordinary images on it, and on the host's kernel
//! where both have to agree.

#[path = "appkernel/net.rs"]
mod net;
#[path = "appkernel/parity.rs"]
mod parity;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_sandboxer::image::{Silent, Store};
use bulkhead_tests::env;
use sha2::{Digest, Sha256};

/// Guests run one after the other: the host may have one CPU.
static ALONE: Mutex<()> = Mutex::new(());

fn kernel() -> PathBuf {
    let path = env::cache().unwrap().join("current/appkernel");
    assert!(
        path.exists(),
        "{} is missing: run `just appkernel`",
        path.display()
    );
    path
}

/// An image's files, for one test alone.
struct Root {
    dir: tempfile::TempDir,
    rootfs: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

/// How a program ended and what it wrote.
#[derive(Debug)]
struct Ran {
    /// What `vmmctl` says.
    vm: i32,
    /// What the first program left; as a shell shows it.
    code: i32,
    /// What was on the console besides the kernel's lines.
    output: String,
    /// The kernel's lines.
    log: String,
    report: serde_json::Value,
}

impl Root {
    fn new(image: &str) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let tar = bulkhead_fixtures::find_image(image)
            .unwrap()
            .unwrap_or_else(|| panic!("image {image} is missing: run `just fixtures`"))
            .oci_tar;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let rootfs = store.get(&tar, &mut Silent).unwrap().rootfs;
        fs::create_dir_all(rootfs.join("tmp")).unwrap();
        // The app kernel has the device itself; on the host a file has to do, without which the
        // shell starts no background jobs.
        fs::create_dir_all(rootfs.join("dev")).unwrap();
        fs::write(rootfs.join("dev/null"), b"").unwrap();
        Self {
            dir,
            rootfs,
            _alone: alone,
        }
    }

    fn put(&self, name: &str, content: &[u8]) {
        fs::write(self.rootfs.join(name), content).unwrap();
    }

    fn boot(&self, cmdline: &str, options: &[&str], input: &[u8]) -> Ran {
        let report = self.dir.path().join("report.json");
        let mut child = Command::new(env::vmmctl().unwrap())
            .args([
                "boot",
                "--timeout",
                "100",
                "--bare-cmdline",
                "--memory",
                "128M",
            ])
            .arg("--share")
            .arg(format!("root={}", self.rootfs.display()))
            .arg("--report")
            .arg(&report)
            .args(options)
            .arg("--cmdline")
            .arg(cmdline)
            .arg(kernel())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        let console = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let (log, shown): (Vec<&str>, Vec<&str>) = console.lines().partition(|l| is_log(l));
        let log = log.join("\n");
        let code = log
            .lines()
            .rev()
            .find_map(|l| l.split_once("first program ended: ")?.1.trim().parse().ok())
            .unwrap_or(-1);
        Ran {
            vm: output.status.code().unwrap_or(-1),
            code,
            output: shown.join("\n"),
            log: format!("{log}\n{}", String::from_utf8_lossy(&output.stderr)),
            report: fs::read(&report)
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok())
                .unwrap_or_default(),
        }
    }

    /// A shell script on the app kernel.
    fn script(&self, text: &str) -> Ran {
        self.put("script.sh", text.as_bytes());
        self.boot("app.run=/bin/sh app.arg=/script.sh", &[], b"")
    }

    /// The same program on the host's kernel.
    fn on_host(&self, program: &[&str]) -> (i32, String) {
        let output = Command::new("chroot")
            .arg(&self.rootfs)
            .args(program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        (
            output.status.code().unwrap_or(-1),
            text.trim_end().to_owned(),
        )
    }
}

/// `[    0.123456] text`
fn is_log(line: &str) -> bool {
    let stamp = line.strip_prefix('[').and_then(|l| l.split_once("] "));
    stamp.is_some_and(|(stamp, _)| stamp.trim().parse::<f64>().is_ok())
}

#[test]
fn a_program_runs_and_its_exit_code_comes_back() {
    let root = Root::new("busybox");
    let ran = root.boot("app.run=/bin/uname app.arg=-s app.arg=-m", &[], b"");
    assert_eq!((ran.vm, ran.code), (0, 0), "{ran:?}");
    assert_eq!(ran.output, "Linux x86_64", "{ran:?}");
    // 8 MiB for an idle container is the aim; this one has ended, and held no more before.
    let resident = ran.report["stats"]["memory_resident_bytes"]
        .as_u64()
        .unwrap();
    assert!(
        resident < 8 << 20,
        "{resident} bytes of the guest's memory are resident"
    );
    let timeline = ran.report["stats"]["timeline"].to_string();
    assert!(
        timeline.contains("guest mark 0x02"),
        "no mark of the first program: {timeline}"
    );
    let ran = root.boot("app.run=/bin/sh app.arg=-c \"app.arg=exit 7\"", &[], b"");
    assert_eq!((ran.vm, ran.code), (0, 7), "{ran:?}");
}

/// Pipes, subshells, background jobs, signals and traps, files and links, interpreters.
const SCRIPT: &str = r#"
exec 2>&1
echo hi | cat
for i in 1 2 3; do echo $i; done | sort -r
trap 'echo got term' TERM; kill -TERM $$; echo after
(trap 'echo got usr1; exit 3' USR1; kill -USR1 $(sh -c 'echo $PPID'); sleep 30); echo "status $?"
sh -c 'kill -SEGV $$'; echo "status $?"
false || echo "false is $?"
mkdir -p /tmp/x/y; echo a > /tmp/x/a; echo b > /tmp/x/y/b; ln -s a /tmp/x/l
tar -C /tmp -cf /tmp/x.tar x; mkdir /tmp/z; tar -C /tmp/z -xf /tmp/x.tar; cat /tmp/z/x/l /tmp/z/x/y/b
find /tmp/z | sort; readlink /tmp/z/x/l; mv /tmp/z/x/a /tmp/z/moved; ls /tmp/z/x; cat /tmp/z/moved
cat /tmp/z/x/l 2>&1; rmdir /tmp/z/x 2>&1; cd /tmp/z/x/y/../y; pwd
awk 'BEGIN { for (i = 0; i < 1000; i++) s += i; printf "%d %.3f\n", s, 10 / 3 }'
seq 1 20000 | wc -c; seq 1 200 | sed 's/1/x/g' | sort | tail -n 2
(sleep 0.1; echo later) & wait; echo waited
printf '#!/bin/sh\necho script $1 $0\n' > /tmp/s; chmod +x /tmp/s; /tmp/s arg
head -c 1000000 /bin/busybox | md5sum; cp /bin/busybox /tmp/copy; cmp /bin/busybox /tmp/copy && echo same
echo one > /tmp/f; echo two >> /tmp/f; wc -l < /tmp/f; : > /tmp/f; wc -c < /tmp/f
printf 'not a program' > /tmp/bad; chmod +x /tmp/bad; /tmp/bad 2>/dev/null; echo "status $?"
printf '\177ELF\2\1\1garbage' > /tmp/bad; /tmp/bad 2>/dev/null; echo "status $?"
/nothing 2>/dev/null; echo "status $?"
ln -s loop /tmp/loop; cat /tmp/loop 2>&1
rm -rf /tmp/x /tmp/x.tar /tmp/z /tmp/s /tmp/copy /tmp/f /tmp/bad /tmp/loop; ls -a /tmp
exit 42
"#;

#[test]
fn a_shell_script_does_the_same_as_on_the_host() {
    let root = Root::new("busybox");
    let ran = root.script(SCRIPT);
    let (code, output) = root.on_host(&["/bin/sh", "/script.sh"]);
    assert_eq!((ran.vm, ran.code), (0, code), "{ran:?}");
    assert_eq!(ran.output, output, "{}", ran.log);
    assert!(
        output.contains("waited") && code == 42,
        "the script itself is wrong: {output}"
    );
}

const PYTHON: &str = r#"
import os, subprocess, sys, threading
total, lock = 0, threading.Lock()
def add(n):
    global total
    for i in range(200):
        with lock:
            total += n
threads = [threading.Thread(target=add, args=(n,)) for n in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print("threads", total)
out = subprocess.run(["/bin/sh", "-c", "cat; exit 5"], input=b"through a pipe", capture_output=True)
print(out.returncode, out.stdout)
r, w = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(w, b"child"); os._exit(9)
print(os.read(r, 10), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(sum(i * i for i in range(10000)), 2 ** 200, 10 / 3)
try:
    open("/nonexistent")
except OSError as e:
    print(e.errno)
sys.exit(6)
"#;

#[test]
fn a_dynamic_program_with_threads_does_the_same_as_on_the_host() {
    let root = Root::new("python3");
    root.put("job.py", PYTHON.as_bytes());
    let program = ["/usr/bin/python3", "-I", "-S", "/job.py"];
    let mut cmdline = format!("app.run={}", program[0]);
    for arg in &program[1..] {
        cmdline += &format!(" app.arg={arg}");
    }
    let ran = root.boot(&cmdline, &[], b"");
    let (code, output) = root.on_host(&program);
    assert_eq!((ran.vm, ran.code), (0, code), "{ran:?}");
    assert_eq!(ran.output, output, "{}", ran.log);
    assert!(
        output.contains("threads 1200") && code == 6,
        "the program itself is wrong: {output}"
    );
}

/// By the C library's own calls: Python has none of them.
const FILES: &str = r#"
import ctypes, os, socket, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    result = getattr(libc, name)(*args)
    return result if result >= 0 else -ctypes.get_errno()
os.makedirs("/tmp/w/sub", exist_ok=True)
open("/tmp/w/old", "w").close()
i = call("inotify_init1", 0o4000)
print(call("inotify_add_watch", i, b"/tmp/w", 0xfff & ~0x21), call("inotify_add_watch", i, b"/tmp/w/old", 0xc06))
print(call("inotify_add_watch", i, b"/tmp/none", 2), call("inotify_add_watch", i, b"/tmp/w/old", 0x01000002))
def show():
    events, out = b"", []
    while True:
        try: events += os.read(i, 4096)
        except BlockingIOError: break
    while events:
        wd, mask, cookie, length = struct.unpack("iIII", events[:16])
        out.append((wd, hex(mask), cookie != 0, events[16:16 + length].rstrip(b"\0").decode()))
        events = events[16 + length:]
    print(*out)
with open("/tmp/w/new", "w") as f: f.write("text")
show()
os.mkdir("/tmp/w/sub/x"); os.chmod("/tmp/w/new", 0o600); os.mkdir("/tmp/w/dir"); show()
os.rename("/tmp/w/new", "/tmp/w/sub/gone"); os.rename("/tmp/w/old", "/tmp/w/named"); show()
open("/tmp/w/named", "a").write("x"); os.unlink("/tmp/w/named"); show()
print(call("inotify_rm_watch", i, 1), call("inotify_rm_watch", i, 1)); show()
open("/tmp/w/quiet", "w").close(); show()

NONE = ctypes.c_void_p()
def splice(a, b, n, flags=0): return call("splice", a, NONE, b, NONE, ctypes.c_size_t(n), flags)
data = bytes(range(256)) * 1000
with open("/tmp/data", "wb") as f: f.write(data)
src, (r, w) = os.open("/tmp/data", os.O_RDONLY), os.pipe()
dst = os.open("/tmp/copy", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
print(splice(src, dst, 10), splice(r, dst, 10, 2))
while (n := splice(src, w, 50000)) > 0:
    while n > 0: n -= splice(r, dst, n)
print(os.pread(dst, 1 << 20, 0) == data, n)
a, b = socket.socketpair()
os.write(w, b"through the pipe")
print(splice(r, a.fileno(), 100), b.recv(100))
b.send(b"and back"); print(splice(a.fileno(), w, 100), os.read(r, 100))
r2, w2 = os.pipe(); os.write(w, b"twice")
print(call("tee", r, w2, ctypes.c_size_t(100), 0), os.read(r2, 10), os.read(r, 10))
offset = ctypes.c_longlong(5)
print(call("splice", src, ctypes.byref(offset), w, NONE, ctypes.c_size_t(3), 0), offset.value, os.read(r, 10))
os.close(w); print(splice(r, dst, 10)); os.close(r)
"#;

#[test]
fn watched_files_and_spliced_pipes_do_the_same_as_on_the_host() {
    let root = Root::new("python3");
    root.put("files.py", FILES.as_bytes());
    let program = ["/usr/bin/python3", "-I", "-S", "/files.py"];
    let cmdline = "app.run=/usr/bin/python3 app.arg=-I app.arg=-S app.arg=/files.py";
    let ran = root.boot(cmdline, &[], b"");
    fs::remove_dir_all(root.rootfs.join("tmp")).unwrap();
    fs::create_dir(root.rootfs.join("tmp")).unwrap();
    let (code, output) = root.on_host(&program);
    assert_eq!((ran.vm, ran.code), (0, code), "{ran:?}");
    assert_eq!(ran.output, output, "{}", ran.log);
    assert!(
        output.contains("through the pipe") && code == 0,
        "the program itself is wrong: {output}"
    );
}

#[test]
fn a_greedy_program_ends_and_the_others_go_on() {
    let root = Root::new("busybox");
    let ran = root.script("tail -c 1000000000 /dev/zero; echo \"status $?\"; uname -s");
    assert_eq!((ran.vm, ran.code), (0, 0), "{ran:?}");
    assert!(ran.log.contains("out of memory: ending process"), "{ran:?}");
    assert!(ran.output.ends_with("status 137\nLinux"), "{ran:?}");
}

/// What is below the limit goes on, what is above ends, also in files; and what has ended counts no
/// more.
const LIMITED: &str = r#"
exec 2>/dev/null
for i in 1 2 3; do head -c 2m /dev/zero | tail -c 2m | wc -c; done
cat /bin/busybox /bin/busybox /bin/busybox /bin/busybox | wc -c | grep -q '[0-9]' && echo read
tail /dev/zero; echo "ended $?"
head -c 20m /dev/zero > /dev/shm/large; echo "too much: $?"; : > /dev/shm/large
head -c 6m /dev/zero > /dev/shm/small && echo written; rm /dev/shm/small
head -c 6m /dev/zero | tail -c 6m | wc -c
"#;

#[test]
fn a_limit_of_memory_ends_only_what_is_above_it() {
    let root = Root::new("busybox");
    root.put("script.sh", LIMITED.as_bytes());
    let cmdline = "app.memory=12M app.run=/bin/sh app.arg=/script.sh";
    let ran = root.boot(cmdline, &[], b"");
    assert_eq!((ran.vm, ran.code), (0, 0), "{ran:?}");
    let expected = "2097152\n2097152\n2097152\nread\nended 137\ntoo much: 137\nwritten\n6291456";
    assert_eq!(ran.output, expected, "{}", ran.log);
    assert!(ran.log.contains("of 12288 KiB"), "{}", ran.log);
}

#[test]
fn input_of_the_console_reaches_the_program() {
    let root = Root::new("busybox");
    let ran = root.boot(
        "app.run=/bin/sh app.arg=-c \"app.arg=read a; read b; echo got $b and $a\"",
        &[],
        b"first\nsecond\n",
    );
    assert_eq!(
        (ran.code, ran.output.as_str()),
        (0, "got second and first"),
        "{ran:?}"
    );
}

#[test]
fn what_cannot_start_is_named() {
    let root = Root::new("busybox");
    let ran = root.boot("app.run=/bin/nothing", &[], b"");
    assert_eq!((ran.vm, ran.code), (0, 125), "{ran:?}");
    assert!(ran.log.contains("/bin/nothing: ENOENT"), "{ran:?}");
    let ran = root.boot("app.root=other app.run=/bin/sh", &[], b"");
    assert!(
        ran.code == 125 && ran.log.contains("no virtio-fs share \"other\""),
        "{ran:?}"
    );
    let ran = root.boot("", &[], b"");
    assert!(
        ran.code == 125 && ran.log.contains("app.run=PROGRAM"),
        "{ran:?}"
    );
}

#[test]
fn calls_are_printed_when_asked_for() {
    let root = Root::new("busybox");
    let ran = root.boot("app.strace app.run=/bin/true", &[], b"");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.log.contains("exit_group(0"), "{ran:?}");
}

/// `vmmctl run --sandbox app`: the kernel is driven by the agent's protocol.
struct App {
    dir: tempfile::TempDir,
    image: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl App {
    fn new(image: &str) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let image = bulkhead_fixtures::find_image(image)
            .unwrap()
            .unwrap_or_else(|| panic!("image {image} is missing: run `just fixtures`"))
            .oci_tar;
        kernel();
        Self {
            dir: tempfile::tempdir().unwrap(),
            image,
            _alone: alone,
        }
    }

    fn vmmctl(&self) -> Command {
        let mut command = Command::new(env::vmmctl().unwrap());
        command
            .env("BULKHEAD_TIMEOUT_FACTOR", "50")
            .arg("--root")
            .arg(self.dir.path().join("store"))
            .env("BULKHEAD_RUN", self.dir.path().join("run"));
        command
    }

    fn command(&self, options: &[&str], program: &[&str]) -> Command {
        let mut command = self.vmmctl();
        command
            .args(["run", "--sandbox", "app", "--memory", "128M"])
            .args(options)
            .arg(&self.image)
            .arg("--")
            .args(program);
        command
    }

    /// Exit code, output, errors.
    fn run(&self, options: &[&str], program: &[&str], input: &[u8]) -> (i32, String, String) {
        let mut child = self
            .command(options, program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that does not read may be gone before all is written.
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        (
            output.status.code().unwrap_or(-1),
            text(&output.stdout),
            text(&output.stderr),
        )
    }
}

#[test]
fn a_container_has_its_environment_user_directory_streams_and_exit_code() {
    let app = App::new("busybox");
    let script = "echo $A; pwd; id -u; id -g; hostname; cat; echo err >&2; exit 7";
    let options = [
        "-i",
        "-e",
        "A=b c",
        "-w",
        "/tmp",
        "-u",
        "1000:100",
        "--hostname",
        "pod",
    ];
    let (code, output, errors) = app.run(&options, &["sh", "-c", script], b"typed\n");
    assert_eq!(
        (code, output.as_str()),
        (7, "b c\n/tmp\n1000\n100\npod\ntyped"),
        "{errors}"
    );
    assert!(errors.contains("err"), "{errors}");
    let (code, _, errors) = app.run(&[], &["nosuch"], b"");
    assert_eq!(code, 127, "{errors}");
    assert!(
        errors.contains("nosuch: executable file not found"),
        "{errors}"
    );
    let (code, _, errors) = app.run(&[], &["/etc"], b"");
    assert_eq!(code, 126, "{errors}");
    // A signal in the program's own hands.
    let (code, ..) = app.run(&[], &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], b"");
    assert_eq!(code, 137);
}

#[test]
fn volumes_proc_and_memory_files_are_where_programs_look_for_them() {
    let app = App::new("busybox");
    let data = app.dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("in"), "from the host\n").unwrap();
    let volume = format!("{}:/data", data.display());
    let read_only = format!("{}:/ro:ro", data.display());
    let script = "cat /data/in; echo back > /data/out; echo x > /ro/x 2>/dev/null || echo refused; \
        echo shm > /dev/shm/f; cat /dev/shm/f; readlink /proc/self; readlink /proc/1/exe | head -c 5; \
        echo; grep -c ^MemTotal /proc/meminfo; ps | grep -c sh; ls /proc/self/fd | head -n 3 | wc -l; \
        head -c 3 /dev/zero | wc -c; echo through > /dev/stdout; df /dev/shm | tail -n 1 | cut -c1-5";
    let (code, output, errors) = app.run(
        &["-v", &volume, "-v", &read_only],
        &["sh", "-c", script],
        b"",
    );
    assert_eq!(code, 0, "{output} {errors}");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[..3], ["from the host", "refused", "shm"], "{output}");
    assert_eq!(lines[4..5], ["/usr/"], "{output}");
    assert_eq!(lines[5], "1", "{output}");
    assert_eq!(lines[7..10], ["3", "3", "through"], "{output}");
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "back\n");
}

#[test]
fn the_calls_of_a_container_are_printed_as_strace_does() {
    let app = App::new("busybox");
    let (code, output, errors) = app.run(&["--strace"], &["cat", "/etc/hostname", "/none"], b"");
    assert_eq!(code, 1, "{output} {errors}");
    for wanted in [
        "openat(AT_FDCWD, \"/none\", 0, 00) = -1 ENOENT",
        "openat(AT_FDCWD, \"/etc/hostname\", 0, 00) = 3",
        "exit_group(1)",
    ] {
        assert!(errors.contains(wanted), "no {wanted:?} in {errors}");
    }
}

#[test]
fn a_terminal_is_one() {
    let app = App::new("busybox");
    let (code, output, errors) = app.run(
        &["-t"],
        &["sh", "-c", "tty; test -t 1 && echo terminal; exit 4"],
        b"",
    );
    assert_eq!(code, 4, "{output} {errors}");
    assert_eq!(output.replace('\r', ""), "/dev/pts/0\nterminal", "{errors}");
}

#[test]
fn programs_are_added_and_signals_arrive() {
    use std::io::{BufRead, BufReader};
    let app = App::new("busybox");
    let script = "trap 'echo got term; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let mut child = app
        .command(&["--name", "box"], &["sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    let exec = |program: &[&str]| {
        let output = app
            .vmmctl()
            .arg("exec")
            .arg("box")
            .args(program)
            .output()
            .unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, text, errors) = exec(&["sh", "-c", "echo added; cat /proc/1/comm; exit 5"]);
    assert_eq!((code, text.as_str()), (5, "added\nsh\n"), "{errors}");
    let (code, _, errors) = exec(&["nosuch"]);
    assert_eq!(code, 127, "{errors}");
    let output_of_inspect = app.vmmctl().args(["inspect", "box"]).output().unwrap();
    let seen: serde_json::Value = serde_json::from_slice(&output_of_inspect.stdout).unwrap();
    assert!(seen["vm"]["unknown_calls"].is_u64(), "{seen}");
    // The first program may end, and all others with it, before `kill` itself has ended.
    let (code, text, errors) = exec(&["kill", "-TERM", "1"]);
    assert!(matches!(code, 0 | 137), "{code} {text} {errors}");
    line.clear();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "got term\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn python_with_threads_files_subprocess_and_a_database_does_the_same_as_on_the_host() {
    let app = App::new("python3");
    let (code, output, errors) = app.run(&[], &["python3", "/app/job.py", "5"], b"");
    assert_eq!(code, 5, "{output} {errors}");
    drop(app);
    let root = Root::new("python3");
    let (host_code, host_output) = root.on_host(&["/usr/bin/python3", "/app/job.py", "5"]);
    assert_eq!((code, output), (host_code, host_output), "{errors}");
}

/// Servers and clients of the container's loopback.
const REDIS: &str = r#"
redis-server --port 6379 --save "" --dir /tmp > /tmp/log 2>&1 &
i=0
while ! redis-cli ping >/dev/null 2>&1; do
    i=$((i+1)); [ $i -gt 300 ] && { cat /tmp/log; exit 1; }; sleep 0.2
done
redis-cli set a 42; redis-cli incr a; redis-cli rpush l x y z; redis-cli lrange l 0 -1
redis-cli -h ::1 ping; redis-cli save; redis-cli shutdown nosave; wait
redis-server --port 6379 --dir /tmp > /tmp/log 2>&1 &
while ! redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.2; done
redis-cli get a; redis-cli shutdown nosave; wait; echo over
"#;

/// Reads a file until little memory is left, then asks for more of the kernel's than that: what waits
/// in pipes, and children.
const BESIDE_A_FULL_CACHE: &str = r#"
import os
big = os.open('/data/big', os.O_RDONLY)
meminfo = os.open('/proc/meminfo', os.O_RDONLY)
data = b'x' * 65536
full = 0
for i in range(1000):
    assert len(os.pread(big, 4096, i * 65536)) == 4096
    free = int(os.pread(meminfo, 200, 0).split()[4])
    pipes = [os.pipe() for _ in range(24 if free < 3600 else 0)]
    for _, into in pipes:
        assert os.write(into, data) == 65536
    child = os.fork()
    if not child:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    full += len(pipes) > 0
    for ends in pipes:
        os.close(ends[0])
        os.close(ends[1])
print('done' if full else 'there was always room')
"#;

#[test]
fn files_that_were_read_are_no_reason_to_refuse_a_fork() {
    let app = App::new("python3");
    let data = app.dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("fork.py"), BESIDE_A_FULL_CACHE).unwrap();
    let big = fs::File::create(data.join("big")).unwrap();
    big.set_len(1000 * 65536).unwrap();
    let volume = format!("{}:/data", data.display());
    let ran = app
        .vmmctl()
        .args(["run", "--sandbox", "app", "--memory", "64M", "-v", &volume])
        .arg(&app.image)
        .args(["--", "python3", "/data/fork.py"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(
        (ran.status.code(), ran.stdout.as_slice()),
        (Some(0), &b"done\n"[..]),
        "{errors}"
    );
}

/// Has more memory than there is below the hole for devices, and a file in what is above.
const HIGH: &str = r#"
import hashlib, mmap, os
total = int(open('/proc/meminfo').read().split()[1])
assert total > 4800 << 10, total
size = 3200 << 20
MAP_POPULATE = 0x8000
m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_POPULATE)
places = range(0, size, 1 << 20)
for at in places:
    m[at:at + 8] = at.to_bytes(8, 'little')
child = os.fork()
if not child:
    m[size - (1 << 20)] = 7
    os._exit(0 if all(m[at + 7] == 0 for at in places) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(m[at:at + 8] == at.to_bytes(8, 'little') for at in places)
with open('/data/in', 'rb') as f:
    print(hashlib.sha256(f.read()).hexdigest())
with open('/data/out', 'wb') as f:
    f.write(m[size - (1 << 20):])
"#;

#[test]
fn memory_above_four_gigabytes_is_used() {
    let app = App::new("python3");
    let data = app.dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("high.py"), HIGH).unwrap();
    let content: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    fs::write(data.join("in"), &content).unwrap();
    let volume = format!("{}:/data", data.display());
    let ran = app
        .vmmctl()
        .args(["run", "--sandbox", "app", "--memory", "5G", "-v", &volume])
        .arg(&app.image)
        .args(["--", "python3", "/data/high.py"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&ran.stderr);
    let sum: String = Sha256::digest(&content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        (
            ran.status.code(),
            String::from_utf8_lossy(&ran.stdout).trim()
        ),
        (Some(0), sum.as_str()),
        "{errors}"
    );
    let last = fs::read(data.join("out")).unwrap();
    let place = (3199u64 << 20).to_le_bytes();
    assert!(
        last.len() == 1 << 20 && last.starts_with(&place),
        "{:?}",
        last.get(..8)
    );
}

#[test]
fn redis_answers_and_keeps_what_it_was_given() {
    let app = App::new("redis");
    let (code, output, errors) = app.run(&["--entrypoint", ""], &["sh", "-c", REDIS], b"");
    assert_eq!(code, 0, "{output} {errors}");
    assert_eq!(output, "OK\n43\n3\nx\ny\nz\nPONG\nOK\n43\nover", "{errors}");
}

/// What a shell cannot do within limits it has set itself.
const LIMITS: &str = r#"
ulimit -n 20; ulimit -n; (ulimit -n 8; exec 9>/tmp/nine) 2>/dev/null || echo no number nine
(ulimit -n 30) 2>/dev/null || echo not raised
(ulimit -f 2; head -c 3000 /dev/zero > /tmp/big; echo $?; wc -c < /tmp/big) 2>/dev/null
grep -c '^Max open files *20 *20 ' /proc/self/limits
ulimit -u 4; for i in 1 2 3 4 5 6; do sleep 1 & done
"#;

#[test]
fn limits_of_a_process_are_kept() {
    let app = App::new("busybox");
    let (code, output, errors) = app.run(&["-u", "1000"], &["sh", "-c", LIMITS], b"");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines[..3],
        ["20", "no number nine", "not raised"],
        "{output} {errors} {code}"
    );
    // Ended by the signal for it, after as much as was allowed.
    assert_eq!(lines[3..6], ["153", "1024", "1"], "{output} {errors}");
    assert!(
        code == 2 && errors.contains("can't fork"),
        "{output} {errors}"
    );
}

#[test]
fn what_the_app_kernel_has_not_is_refused_in_words() {
    let app = App::new("busybox");
    for (options, words) in [
        (&["--cpus", "2"][..], "uses one CPU"),
        (&["--image", "x"][..], "needs no guest image"),
    ] {
        let (code, _, errors) = app.run(options, &["true"], b"");
        assert_eq!(code, 125, "{errors}");
        assert!(errors.contains(words), "{errors}");
    }
}

#[test]
fn the_kernel_is_small() {
    let bytes = fs::metadata(kernel()).unwrap().len();
    assert!(
        bytes < 2 << 20,
        "{} has {bytes} bytes",
        Path::new("kernel").display()
    );
}
