//! Random system calls on the app kernel (`tests/guest/calls.c`): whatever a program does, the
//! kernel neither panics nor hangs, and its other programs go on.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::env;
use crate::process::Guard;

/// The machine hangs when it says nothing for so long: a round takes 3 s at most, and what it left
/// has a minute to go.
const SILENCE: Duration = Duration::from_secs(180);
/// Lines of the console that a finding shows.
const SHOWN: usize = 60;

/// What to play.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// Rounds from the first on until the time is over.
    Seconds(u64),
    /// So many rounds from this one on.
    Rounds(u64, u64),
}

/// Plays rounds of `seed` in a VM of its own; gives how many there were.
///
/// # Errors
/// A finding, with what repeats it; or something is not built.
pub fn play(seed: u64, length: Length) -> Result<u64> {
    let root = tempfile::tempdir()?;
    for dir in ["tmp", "dev", "proc", "sys"] {
        fs::create_dir(root.path().join(dir))?;
    }
    let program = env::guest_programs()?.join("calls");
    fs::copy(&program, root.path().join("calls")).with_context(|| program.display().to_string())?;
    let arguments = match length {
        Length::Seconds(seconds) => format!("app.arg={seed} app.arg={seconds}"),
        Length::Rounds(first, count) => {
            format!("app.arg={seed} app.arg=rounds app.arg={first} app.arg={count}")
        }
    };
    watch(root.path(), &arguments).map_err(|finding| {
        let again = finding.round.map_or(String::new(), |round| {
            format!("; again: FUZZ_SEED={seed} FUZZ_ROUNDS={round}+1 just fuzz appkernel (with those before it: 0+{})", round + 1)
        });
        anyhow::anyhow!(
            "seed {seed}, round {:?}: {}{again}\n{}",
            finding.round,
            finding.what,
            finding.console
        )
    })
}

/// What went wrong.
#[derive(Debug)]
struct Finding {
    what: String,
    round: Option<u64>,
    console: String,
}

fn watch(root: &Path, arguments: &str) -> Result<u64, Finding> {
    let mut round = None;
    let mut tail: VecDeque<String> = VecDeque::with_capacity(SHOWN);
    let watched = (|| -> Result<u64> {
        let mut child = Guard(
            Command::new(env::vmmctl()?)
                .args(["boot", "--bare-cmdline", "--memory", "128M", "--share"])
                .arg(format!("root={}", root.display()))
                .arg("--cmdline")
                .arg(format!("norandmaps app.run=/calls {arguments}"))
                .arg(env::app_kernel()?)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::inherit())
                .spawn()
                .context("vmmctl")?,
        );
        let output = child.0.stdout.take().context("stdout")?;
        let (sender, lines) = channel();
        // Ends with the output, which ends with the guard.
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
        let mut done = None;
        loop {
            let line = match lines.recv_timeout(SILENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!("nothing was said for {SILENCE:?}: a hang"),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let line = line.trim_end_matches('\r');
            if let Some(number) = line.strip_prefix("round ").and_then(|n| n.parse().ok()) {
                round = Some(number);
            } else if let Some(count) = line.strip_prefix("rounds done: ") {
                done = count.parse().ok();
            } else {
                if tail.len() == SHOWN {
                    tail.pop_front();
                }
                tail.push_back(line.to_owned());
            }
        }
        let status = child.0.wait()?;
        let ended = tail.iter().any(|l| l.ends_with("first program ended: 0"));
        match done {
            Some(count) if status.success() && ended => Ok(count),
            _ => bail!("vmmctl ended with {status}, and not all rounds were played"),
        }
    })();
    watched.map_err(|error| Finding {
        what: format!("{error:#}"),
        round,
        console: Vec::from(tail).join("\n"),
    })
}
