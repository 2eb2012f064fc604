// SPDX-License-Identifier: Apache-2.0
//! The command: what the driver asks for, how it is started, its streams and its end.
//!
//! Ports (virtio-serial): `ctl` carries lines both ways, `in` carries frames of a 32-bit
//! little-endian length and that many bytes (length 0: end of file), `out` and `err` carry the
//! plain bytes; EXIT on `ctl` says how many, so the driver knows when it has all of them.

use crate::boot::Share;
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, PollFd};
use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

/// What to run. On the wire: `JOB <bytes>\n`, then `key=value` fields, each ended by a NUL.
#[derive(Default)]
pub struct Job {
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: String,
    pub pty: bool,
    pub rows: u16,
    pub cols: u16,
    pub shares: Vec<Share>,
    pub modules_dir: String,
    pub clock_ns: i64,
}

impl Job {
    pub fn read(ctl: &mut impl BufRead) -> io::Result<Job> {
        let mut line = String::new();
        ctl.read_line(&mut line)?;
        let len = line
            .strip_prefix("JOB ")
            .and_then(|n| n.trim().parse::<usize>().ok());
        let len = len.ok_or_else(|| io::Error::other(format!("not a job: {line:?}")))?;
        let mut raw = vec![0; len];
        ctl.read_exact(&mut raw)?;
        let text = String::from_utf8(raw).map_err(io::Error::other)?;
        let mut job = Job::default();
        for field in text.split_terminator('\0') {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            match key {
                "arg" => job.args.push(value.into()),
                "env" => {
                    let (k, v) = value.split_once('=').unwrap_or((value, ""));
                    job.env.push((k.into(), v.into()));
                }
                "cwd" => job.cwd = value.into(),
                "pty" => job.pty = value == "1",
                "rows" => job.rows = value.parse().unwrap_or(24),
                "cols" => job.cols = value.parse().unwrap_or(80),
                "modules" => job.modules_dir = value.into(),
                "clock" => job.clock_ns = value.parse().unwrap_or(0),
                "share" => {
                    let mut p = value.splitn(3, ':');
                    if let (Some(tag), Some(mode), Some(path)) = (p.next(), p.next(), p.next()) {
                        let (tag, path) = (tag.into(), path.into());
                        job.shares.push(Share {
                            tag,
                            path,
                            read_only: mode == "ro",
                        });
                    }
                }
                other => return Err(io::Error::other(format!("unknown job field {other:?}"))),
            }
        }
        Ok(job)
    }
}

/// The writing side of the control port, shared by the threads.
#[derive(Clone)]
pub struct Control(pub Arc<Mutex<File>>);

impl Control {
    /// One line to the driver. Without a driver there is nobody to tell, so errors are ignored.
    pub fn say(&self, line: &str) {
        if let Ok(mut f) = self.0.lock() {
            let _ = f.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes());
        }
    }
}

const FINISH: u8 = b'f';
const CLOSE: u8 = b'c';

/// One output stream: pipe (or terminal) to port.
struct Pump {
    wake: File,
    thread: thread::JoinHandle<u64>,
}

impl Pump {
    fn start(name: &'static str, from: OwnedFd, mut to: File) -> io::Result<Pump> {
        let (wake_rx, wake_tx) = sys::new_pipe()?;
        let thread = thread::spawn(move || {
            sys::name_thread(name);
            let mut source = Some(File::from(from));
            let mut wake_rx = File::from(wake_rx);
            let mut buf = vec![0; 64 << 10];
            let mut sent = 0;
            let mut finishing = false;
            while let Some(src) = source.as_mut() {
                let interest = |fd: RawFd| PollFd {
                    fd,
                    events: POLLIN,
                    revents: 0,
                };
                let mut fds = [interest(src.as_raw_fd()), interest(wake_rx.as_raw_fd())];
                // When the command has ended only what is in the pipe already still counts: a
                // daemon it left behind may hold the other end open for ever.
                if sys::wait_readable(&mut fds, if finishing { 0 } else { -1 }).is_err() {
                    break;
                }
                if fds[1].revents & POLLIN != 0 && !finishing {
                    let mut b = [0];
                    match wake_rx.read(&mut b) {
                        Ok(1) if b[0] == CLOSE => source = None,
                        _ => finishing = true,
                    }
                    continue;
                }
                if fds[0].revents & (POLLIN | POLLHUP | POLLERR) == 0 {
                    break;
                }
                match src.read(&mut buf) {
                    Ok(n) if n > 0 => {
                        if to.write_all(&buf[..n]).is_err() {
                            break;
                        }
                        sent += n as u64;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // End of file, or EIO: the last user of the terminal is gone.
                    _ => break,
                }
            }
            sent
        });
        Ok(Pump {
            wake: wake_tx.into(),
            thread,
        })
    }

    fn finish(mut self) -> u64 {
        let _ = self.wake.write_all(&[FINISH]);
        self.thread.join().unwrap_or(0)
    }
}

/// Standard input: frames from the port to the command.
fn feed(mut port: File, to: OwnedFd, pty: bool) {
    thread::spawn(move || {
        sys::name_thread("stdin");
        let mut to = Some(File::from(to));
        let mut len = [0; 4];
        let mut buf = vec![0; 64 << 10];
        while port.read_exact(&mut len).is_ok() {
            let mut left = u32::from_le_bytes(len) as usize;
            if left == 0 {
                match to.take() {
                    // A terminal has no end of file but its EOF character.
                    Some(mut tty) if pty => {
                        let _ = tty.write_all(&[4]);
                        to = Some(tty);
                    }
                    other => drop(other),
                }
            }
            while left > 0 {
                let n = left.min(buf.len());
                if port.read_exact(&mut buf[..n]).is_err() {
                    return;
                }
                left -= n;
                // A command that closed its input does not want the rest.
                if to.as_mut().is_some_and(|t| t.write_all(&buf[..n]).is_err()) {
                    to = None;
                }
            }
        }
    });
}

/// Orders from the driver while the command runs.
fn obey(mut ctl: impl BufRead + Send + 'static, pid: i32, tty: Option<File>, mut wakes: Vec<File>) {
    thread::spawn(move || {
        sys::name_thread("control");
        let mut line = String::new();
        while ctl.read_line(&mut line).is_ok_and(|n| n > 0) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let num = |i: usize| words.get(i).and_then(|w| w.parse::<i32>().ok());
            match (words.first().copied(), num(1), num(2)) {
                (Some("SIG"), Some(sig), _) => sys::send_signal(-pid, sig),
                (Some("WINCH"), Some(rows), Some(cols)) => {
                    if let Some(t) = &tty {
                        sys::set_window(t.as_raw_fd(), rows as u16, cols as u16);
                    }
                }
                (Some("CLOSE"), Some(n), _) => {
                    if let Some(w) = wakes.get_mut((n - 1) as usize) {
                        let _ = w.write_all(&[CLOSE]);
                    }
                }
                _ => {}
            }
            line.clear();
        }
        // The driver is gone: nothing here may outlive it.
        sys::send_signal(-1, sys::SIGKILL);
        sys::power_off();
    });
}

/// Runs the job to its end: (exit code, bytes on stdout, bytes on stderr).
pub fn run(
    job: &Job,
    ctl_in: impl BufRead + Send + 'static,
    ctl: &Control,
    port: impl Fn(&str) -> io::Result<File>,
) -> io::Result<(i32, u64, u64)> {
    let program = job
        .args
        .first()
        .ok_or_else(|| io::Error::other("job without a command"))?;
    let mut cmd = Command::new(program);
    cmd.args(&job.args[1..])
        .env_clear()
        .envs(job.env.iter().cloned());
    // CLOEXEC pipes: dup2 onto 0, 1, 2 by Command clears the flag for those alone.
    let (out, err, input, tty) = if job.pty {
        let (master, slave) = sys::open_pty()?;
        sys::set_window(master.as_raw_fd(), job.rows, job.cols);
        cmd.stdin(Stdio::from(slave.try_clone()?));
        cmd.stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave));
        let tty = File::from(master.try_clone()?);
        (master.try_clone()?, None, master, Some(tty))
    } else {
        let (in_rx, in_tx) = sys::new_pipe()?;
        let (out_rx, out_tx) = sys::new_pipe()?;
        let (err_rx, err_tx) = sys::new_pipe()?;
        sys::grow_pipe(out_rx.as_raw_fd());
        cmd.stdin(Stdio::from(in_rx))
            .stdout(Stdio::from(out_tx))
            .stderr(Stdio::from(err_tx));
        (out_rx, Some(err_rx), in_tx, None)
    };
    if !job.cwd.is_empty() {
        cmd.current_dir(&job.cwd);
    }
    let pty = job.pty;
    // SAFETY: the closure makes only async-signal-safe system calls.
    unsafe {
        cmd.pre_exec(move || {
            sys::normal_scheduling()?;
            sys::new_session(pty)
        });
    }
    let child = match cmd.spawn() {
        Ok(child) => child,
        Err(e) => {
            let code = if e.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            ctl.say(&format!(
                "NOTE cannot run {program:?} in {:?}: {e}",
                job.cwd
            ));
            return Ok((code, 0, 0));
        }
    };
    let pid = child.id() as i32;
    drop(cmd); // closes our copies of the command's ends, or the pumps would never see the end
    ctl.say(&format!("STARTED {pid}"));

    let out = Pump::start("stdout", out, port("out")?)?;
    let err = err
        .map(|e| Pump::start("stderr", e, port("err")?))
        .transpose()?;
    let mut wakes = vec![out.wake.try_clone()?];
    if let Some(e) = &err {
        wakes.push(e.wake.try_clone()?);
    }
    feed(port("in")?, input, pty);
    obey(ctl_in, pid, tty, wakes);
    // PID 1 inherits every orphan; wait for all, stop at ours.
    let code = loop {
        match sys::wait_any()? {
            (p, code) if p == pid => break code,
            _ => {}
        }
    };
    Ok((code, out.finish(), err.map_or(0, Pump::finish)))
}
