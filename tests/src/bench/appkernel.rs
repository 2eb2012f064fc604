//! The app kernel beside the Linux microVM, and beside runc on the host's kernel, in one run: what
//! it costs to start and to keep, and what programs feel.
//!
//! All of them run the same programs of the same images on one CPU. The programs take their times
//! themselves (`tests/guest/micro.c`), but for starts, which are from the start of the process to the
//! marker's arrival at its output.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_fixtures::BENCH_MARKER;
use bulkhead_sandboxer::image::{Silent, Store};

use super::report::{Goal, Report};
use crate::env;
use crate::process::{Guard, memory, wait_for_marker};
use crate::runc::{self, Bundle};

const MEMORY_MIB: u64 = 128;
const PATIENCE: Duration = Duration::from_secs(120);
/// Starts of each kind; the first one warms caches and is not counted.
const STARTS: usize = 9;
/// Seconds that an idle container rests before its memory is looked at.
const REST: Duration = Duration::from_secs(5);
const RUNC: &str = "runc";

/// Parts of the benchmark, in the order in which they run.
pub const PARTS: [&str; 7] = [
    "size",
    "instructions",
    "start",
    "idle",
    "calls",
    "redis",
    "nginx",
];

/// Where things are.
#[derive(Debug)]
struct Lab {
    vmmctl: PathBuf,
    kernel: PathBuf,
    linux: PathBuf,
    /// The programs of `tests/guest`.
    programs: PathBuf,
    scratch: tempfile::TempDir,
}

/// Runs these parts. `programs` is what `tests/guest/build` names.
///
/// # Errors
/// Something is not built, or a VM does not do what it should.
pub fn run(vmmctl: &Path, programs: &Path, parts: &[String]) -> Result<Report> {
    let scratch = tempfile::tempdir()?;
    // From a local file system, as an installed program would be.
    let local = |path: &Path, name: &str| -> Result<PathBuf> {
        let copy = scratch.path().join(name);
        fs::copy(path, &copy).with_context(|| path.display().to_string())?;
        Ok(copy)
    };
    let lab = Lab {
        vmmctl: local(vmmctl, "vmmctl")?,
        kernel: local(&env::app_kernel()?, "appkernel")?,
        linux: local(&env::vmlinux()?, "vmlinux")?,
        programs: programs.to_owned(),
        scratch,
    };
    let mut report = Report::new("appkernel", "Linux microVM", "of ours");
    for part in parts {
        match part.as_str() {
            "size" => size(&lab, &mut report)?,
            "instructions" => instructions(&lab, &mut report)?,
            "start" => start(&lab, &mut report)?,
            "idle" => idle(&lab, &mut report)?,
            "calls" => calls(&lab, &mut report)?,
            "redis" => redis(&lab, &mut report)?,
            "nginx" => nginx(&lab, &mut report)?,
            other => bail!("unknown part {other}: there are {}", PARTS.join(", ")),
        }
    }
    report.beside("Linux microVM", "of ours");
    Ok(report)
}

/// Which guest runs a program of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    App,
    Linux,
}

impl Lab {
    fn image(name: &str) -> Result<PathBuf> {
        let image = bulkhead_fixtures::find_image(name)?;
        Ok(image
            .with_context(|| format!("image {name}: run `just fixtures`"))?
            .oci_tar)
    }

    /// The root file system of an image, unpacked, with the programs at /b.
    fn rootfs(&self, image: &str) -> Result<PathBuf> {
        let store = Store::open(&self.scratch.path().join("store"))?;
        let rootfs = store.get(&Self::image(image)?, &mut Silent)?.rootfs;
        let to = rootfs.join("b");
        fs::create_dir_all(&to)?;
        fs::copy(self.programs.join("micro"), to.join("micro"))?;
        fs::write(to.join("hello"), bulkhead_fixtures::bench_init_elf())?;
        set_mode(&to.join("hello"))?;
        Ok(rootfs)
    }

    fn vmmctl(&self) -> Command {
        let mut command = Command::new(&self.vmmctl);
        command
            .env("BULKHEAD_TIMEOUT_FACTOR", "50")
            .env("BULKHEAD_RUN", self.scratch.path().join("run"))
            .arg("--root")
            .arg(self.scratch.path().join("images"));
        command
    }

    /// A command that runs a program of an image, with the programs of `tests/guest` at /b.
    fn container(&self, guest: Guest, image: &str, program: &[&str]) -> Result<Command> {
        let mut command = self.vmmctl();
        command.args(["run", "--memory", &format!("{MEMORY_MIB}M")]);
        match guest {
            Guest::App => command
                .args(["--sandbox", "app", "--kernel"])
                .arg(&self.kernel),
            Guest::Linux => command.arg("--kernel").arg(&self.linux),
        };
        command
            .args(["--entrypoint", "", "--user", "0:0", "-v"])
            .arg(format!("{}:/b:ro", self.programs.display()))
            .arg(Self::image(image)?)
            .arg("--")
            .args(program)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs it everywhere and gives what it wrote: app kernel, Linux microVM, runc.
    fn everywhere(&self, image: &str, program: &[&str]) -> Result<[String; 3]> {
        let text = |what: &str, output: Output| -> Result<String> {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(
                output.status.success(),
                "{what}: {program:?}: {}: {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            Ok(text)
        };
        let bundle = tempfile::tempdir_in(self.scratch.path())?;
        let rootfs = self.rootfs(image)?;
        let bundle = Bundle::new(bundle.path(), &rootfs, &[(&self.programs, "/b")])?;
        Ok([
            text(
                "app kernel",
                self.container(Guest::App, image, program)?.output()?,
            )?,
            text(
                "Linux microVM",
                self.container(Guest::Linux, image, program)?.output()?,
            )?,
            text(RUNC, bundle.run(program)?)?,
        ])
    }
}

fn set_mode(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn size(lab: &Lab, report: &mut Report) -> Result<()> {
    let bytes = |path: &Path| -> Result<f64> { Ok(fs::metadata(path)?.len() as f64 / 1024.0) };
    report.add(
        "kernel file",
        "KiB",
        &[bytes(&lab.kernel)?],
        &[bytes(&lab.linux)?],
        Goal::Value(2048.0),
        "stat",
    );
    Ok(())
}

/// Instructions from the kernel's first to the first program's first: QEMU's emulator tells a plugin
/// (`tests/guest/count.c`) of each one. The program comes from a virtio-fs share, as with our VMM, but
/// from QEMU's server and without the agent.
fn instructions(lab: &Lab, report: &mut Report) -> Result<()> {
    let rootfs = lab.rootfs("busybox")?;
    let socket = lab.scratch.path().join("fs.socket");
    let listener = UnixListener::bind(&socket)?;
    let _server = Guard(
        Command::new("/usr/libexec/virtiofsd")
            .args(["--fd=0", "--sandbox=none", "--seccomp=none"])
            .args(["--log-level=error", "--shared-dir"])
            .arg(&rootfs)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .context("virtiofsd")?,
    );
    let memory = "memory-backend-memfd,id=ram,size=128M,share=on";
    let output = Command::new("timeout")
        .arg(PATIENCE.as_secs().to_string())
        .arg("qemu-system-x86_64")
        .args(["-M", "microvm,memory-backend=ram,acpi=off", "-m", "128"])
        .args(["-object", memory, "-accel", "tcg", "-cpu", "max"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(["-global", "virtio-mmio.force-legacy=false", "-chardev"])
        .arg(format!("socket,id=fs,path={}", socket.display()))
        .args(["-device", "vhost-user-fs-device,chardev=fs,tag=root"])
        .args(["-append", "quiet app.run=/b/hello", "-plugin"])
        .arg(lab.programs.join("count.so"))
        .arg("-kernel")
        .arg(&lab.kernel)
        .stdin(Stdio::null())
        .output()
        .context("qemu-system-x86_64")?;
    let (out, said) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    let count = said
        .lines()
        .find_map(|line| line.strip_prefix("instructions: ")?.parse::<f64>().ok());
    let count = count.with_context(|| format!("nothing was counted: {out}{said}"))?;
    // What was counted led to where it should.
    ensure!(
        out.contains(BENCH_MARKER),
        "the program did not run: {out}{said}"
    );
    report.add(
        "from the kernel's first instruction to the first user instruction",
        "instructions",
        &[count],
        &[],
        Goal::Value(1e6),
        "qemu-system-x86_64 -M microvm -accel tcg -plugin count.so -kernel APPKERNEL -append 'quiet app.run=/b/hello', its root by virtiofsd",
    );
    Ok(())
}

/// Lines `NAME NUMBER` of a name.
fn samples(text: &str, name: &str) -> Result<Vec<f64>> {
    let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let found = lines.filter(|(n, _)| n.trim() == name);
    let numbers: Vec<f64> = found.filter_map(|(_, n)| n.trim().parse().ok()).collect();
    ensure!(!numbers.is_empty(), "no {name:?} in {text:?}");
    Ok(numbers)
}

fn spawn(command: &mut Command) -> Result<(Guard, Instant)> {
    let begin = Instant::now();
    let child: Child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    Ok((Guard(child), begin))
}

fn start(lab: &Lab, report: &mut Report) -> Result<()> {
    let rootfs = lab.rootfs("busybox")?;
    let initramfs = lab.scratch.path().join("bench.cpio");
    fs::write(&initramfs, bulkhead_fixtures::bench_initramfs())?;
    let out = lab.scratch.path().join("report.json");
    let app = |options: &[&str], program: &str| {
        let mut command = lab.vmmctl();
        command
            .args(["boot", "--bare-cmdline", "--memory"])
            .arg(format!("{MEMORY_MIB}M"))
            .arg("--share")
            .arg(format!("root={}", rootfs.display()))
            .args(options)
            .arg("--cmdline")
            .arg(format!("quiet app.run={program}"))
            .arg(&lab.kernel);
        command
    };
    let linux = || {
        let mut command = lab.vmmctl();
        command
            .args(["boot", "--cmdline", "quiet", "--memory"])
            .arg(format!("{MEMORY_MIB}M"))
            .arg("--initramfs")
            .arg(&initramfs)
            .arg(&lab.linux);
        command
    };
    let shown = "vmmctl boot --memory 128M --share root=ROOT --bare-cmdline --cmdline 'quiet app.run=/b/hello' APPKERNEL; Linux: --initramfs FILE --cmdline quiet";
    let mut times = (Vec::new(), Vec::new());
    for round in 0..=STARTS {
        let mut took = [0.0; 2];
        for (slot, mut command) in took.iter_mut().zip([app(&[], "/b/hello"), linux()]) {
            let (mut child, begin) = spawn(&mut command)?;
            let mut output = child.0.stdout.take().context("stdout")?;
            let (at, _) = wait_for_marker(&mut output, BENCH_MARKER.as_bytes(), PATIENCE)?;
            *slot = at.duration_since(begin).as_secs_f64() * 1e3;
        }
        if round > 0 {
            times.0.push(took[0]);
            times.1.push(took[1]);
        }
    }
    report.add(
        "process start to the first program's first words",
        "ms",
        &times.0,
        &times.1,
        Goal::Ratio(0.1),
        shown,
    );
    // What the VMM itself says: from its start to the instruction before the program's first.
    let run = |options: &[&str]| -> Result<serde_json::Value> {
        let _ = fs::remove_file(&out);
        let report = out.display().to_string();
        let all: Vec<&str> = ["--report", &report]
            .iter()
            .chain(options)
            .copied()
            .collect();
        let output = app(&all, "/bin/true").stdin(Stdio::null()).output()?;
        ensure!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(serde_json::from_slice(&fs::read(&out)?)?)
    };
    let mut stages = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let ran = run(&[])?;
        let timeline = ran["stats"]["timeline"].as_array().context("timeline")?;
        let at = |stage: &str| -> Result<f64> {
            let found = timeline.iter().find(|mark| mark["stage"] == stage);
            let us = found.and_then(|mark| mark["us"].as_f64());
            Ok(us.with_context(|| format!("no stage {stage:?} in {timeline:?}"))? / 1e3)
        };
        stages.0.push(at("guest mark 0x02")?);
        stages
            .1
            .push(at("guest mark 0x02")? - at("first instruction")?);
    }
    let command = "vmmctl boot --report FILE --share root=ROOT --cmdline app.run=/bin/true";
    report.add(
        "VM start to the first program",
        "ms",
        &stages.0,
        &[],
        Goal::Shown,
        command,
    );
    report.add(
        "of these, from the kernel's first instruction",
        "ms",
        &stages.1,
        &[],
        Goal::Shown,
        command,
    );
    Ok(())
}

fn idle(lab: &Lab, report: &mut Report) -> Result<()> {
    let program = ["sh", "-c", "echo READY; exec sleep 100000"];
    let measure = |guest| -> Result<(f64, f64)> {
        let (mut child, _) = spawn(&mut lab.container(guest, "busybox", &program)?)?;
        let mut output = child.0.stdout.take().context("stdout")?;
        wait_for_marker(&mut output, b"READY", PATIENCE)?;
        std::thread::sleep(REST);
        let found = memory(child.0.id(), MEMORY_MIB << 20)?;
        Ok((found.guest as f64 / 1024.0, found.pss as f64 / 1024.0))
    };
    let (app, linux) = (measure(Guest::App)?, measure(Guest::Linux)?);
    let command = "vmmctl run [--sandbox app] --memory 128M busybox -- sh -c 'exec sleep 100000'";
    report.add(
        "guest memory of an idle busybox container",
        "MiB",
        &[app.0],
        &[linux.0],
        Goal::Value(8.0),
        command,
    );
    report.add(
        "memory of its VMM beside that",
        "MiB",
        &[app.1],
        &[linux.1],
        Goal::Shown,
        command,
    );
    Ok(())
}

fn calls(lab: &Lab, report: &mut Report) -> Result<()> {
    let texts = lab.everywhere("busybox", &["/b/micro"])?;
    let runc = runc::version()?;
    for (name, what, goal) in [
        ("getpid", "getpid", Goal::Ratio(2.0)),
        ("pread", "pread of 4 KiB from the cache", Goal::Ratio(2.0)),
        (
            "fork+exec+wait",
            "fork, exec and wait of a static program",
            Goal::Ratio(1.5),
        ),
        ("pipe", "a byte through a pipe and one back", Goal::Shown),
        ("fault", "touching a new page", Goal::Shown),
        ("clock_gettime", "clock_gettime", Goal::Shown),
    ] {
        let [app, linux, native] = [0, 1, 2].map(|i| samples(&texts[i], name));
        let (app, native) = (app?, native?);
        report.beside("Linux microVM", "of ours");
        report.add(
            what,
            "ns",
            &app,
            &linux?,
            goal,
            "vmmctl run [--sandbox app] -v …:/b busybox -- /b/micro",
        );
        report.beside(RUNC, &runc);
        let what = format!("{what}, beside runc");
        report.add(
            &what,
            "ns",
            &app,
            &native,
            Goal::Shown,
            "runc run: /b/micro",
        );
    }
    Ok(())
}

/// redis' own benchmark over the loopback.
const REDIS: &str = r#"
redis-server --port 6379 --save "" --dir /tmp > /tmp/log 2>&1 &
until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done
for i in 1 2 3; do
    redis-benchmark -t set,get -n 3000 -c 10 --csv 2>/dev/null | tr -d '"' | awk -F, '/^(SET|GET),/ { print $1, $2 }'
done
redis-cli shutdown nosave; wait
"#;

fn redis(lab: &Lab, report: &mut Report) -> Result<()> {
    let texts = lab.everywhere("redis", &["sh", "-c", REDIS])?;
    let runc = runc::version()?;
    for name in ["SET", "GET"] {
        let what = format!("redis-benchmark {name}, 10 connections");
        rates(report, &what, &texts, name, &runc)?;
    }
    Ok(())
}

/// Requests a second, everywhere: beside both peers.
fn rates(
    report: &mut Report,
    what: &str,
    texts: &[String; 3],
    name: &str,
    runc: &str,
) -> Result<()> {
    let app = samples(&texts[0], name)?;
    report.beside("Linux microVM", "of ours");
    report.add(
        what,
        "1/s",
        &app,
        &samples(&texts[1], name)?,
        Goal::Shown,
        what,
    );
    report.beside(RUNC, runc);
    let what = &format!("{what}, beside runc");
    report.add(
        what,
        "1/s",
        &app,
        &samples(&texts[2], name)?,
        Goal::Shown,
        what,
    );
    Ok(())
}

/// One connection and request after the other, of a client within the container.
const NGINX: &str = r#"
sed -i 's/^worker_processes.*/worker_processes 1;/; s/access_log.*/access_log off;/; s/^error_log.*/error_log stderr;/' \
    /etc/nginx/nginx.conf
nginx -g 'daemon on;' > /tmp/log 2>&1
until wget -qO- http://127.0.0.1/health 2>/dev/null | grep -q healthy; do sleep 0.1; done
/b/micro http 80 /index.html 100 | awk '/^http/ { print "http", 1e9 / $2 }'
nginx -s quit > /tmp/log 2>&1
"#;

fn nginx(lab: &Lab, report: &mut Report) -> Result<()> {
    let texts = lab.everywhere("nginx", &["sh", "-c", NGINX])?;
    let what = "nginx: small files, a connection each";
    rates(report, what, &texts, "http", &runc::version()?)
}

#[cfg(test)]
mod tests {
    use super::samples;

    #[test]
    fn lines_of_a_name_are_taken() {
        let text = "getpid 12.5\nfork+exec+wait 3\ngetpid 13\ndone\n";
        assert_eq!(samples(text, "getpid").unwrap(), [12.5, 13.0]);
        assert_eq!(samples(text, "fork+exec+wait").unwrap(), [3.0]);
        assert!(samples(text, "pread").is_err());
    }
}
