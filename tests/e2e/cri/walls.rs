//! A container that tries to get out (`tests/guest/walls.c`), with all rights that a pod can have.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{APP, Node, OURS, WASM};
use bulkhead_tests::cri::proto::Mount;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::{self, PATIENCE};

use super::Test;
use super::failure::{privileged, with_privileges};
use super::host::Host;
use super::wasm;

pub const TESTS: &[Test] = &[("hostile_container", false, |node, _| {
    for (handler, rounds) in [(OURS, "5"), (APP, "5")] {
        hostile_container(node, handler, rounds).with_context(|| handler.to_owned())?;
    }
    Ok(())
})];

const SECRET: &str = "BULKHEAD-SECRET";
/// The volume, and a file beside it.
const PLACE: &str = "/var/lib/hostile-container";

fn digest(path: &Path) -> Result<u64> {
    use std::hash::{DefaultHasher, Hasher as _};
    let mut hasher = DefaultHasher::new();
    let mut file = fs::File::open(path)?;
    let mut part = vec![0; 1 << 20];
    loop {
        match file.read(&mut part)? {
            0 => return Ok(hasher.finish()),
            got => hasher.write(part.get(..got).unwrap_or_default()),
        }
    }
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Nothing in a directory is a device.
fn no_devices(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        ensure!(
            !kind.is_block_device() && !kind.is_char_device(),
            "{} is a device",
            entry.path().display()
        );
    }
    Ok(())
}

const NEIGHBOURS: [&str; 3] = [OURS, APP, WASM];

/// A pod beside the hostile one, whose answers are looked at meanwhile.
struct Neighbour {
    handler: &'static str,
    pod: TestPod,
    /// Its container, where there is one all the time.
    c: String,
    /// Of a wasm pod: where its program is, and what it copies.
    volume: tempfile::TempDir,
    quiet: Vec<Duration>,
    busy: Vec<Duration>,
}

impl Neighbour {
    fn run(node: &Node, handler: &'static str) -> Result<Self> {
        let volume = tempfile::tempdir()?;
        let pod = TestPod::run(node, handler, pod(&format!("beside-{handler}")))?;
        let mut c = String::new();
        if handler == WASM {
            fs::write(volume.path().join("copy.wasm"), wat::parse_str(wasm::COPY)?)?;
        } else {
            c = pod.sleeper("c")?;
            pod.sh(&c, "echo mine > /tmp/mine")?;
        }
        let mut neighbour = Self {
            handler,
            pod,
            c,
            volume,
            quiet: Vec::new(),
            busy: Vec::new(),
        };
        for _ in 0..5 {
            let wait = neighbour.answer()?;
            neighbour.quiet.push(wait);
        }
        Ok(neighbour)
    }

    /// How long a right answer takes: of a VM to Exec, of a wasm pod a program from its start to its
    /// end.
    fn answer(&self) -> Result<Duration> {
        let begin = Instant::now();
        if self.handler != WASM {
            let answer = self.pod.sh(&self.c, "cat /tmp/mine")?;
            ensure!(answer == "mine\n", "{answer:?}");
            return Ok(begin.elapsed());
        }
        let dir = self.volume.path();
        let text = format!("answer {}\n", self.busy.len());
        fs::write(dir.join("in"), &text)?;
        let mut spec = container("copy", "busybox", &["/data/copy.wasm"]);
        spec.mounts = vec![Mount {
            container_path: "/data".into(),
            host_path: dir.to_string_lossy().into_owned(),
            ..Mount::default()
        }];
        let begin = Instant::now();
        let c = self.pod.start(&spec)?;
        let status = self.pod.cri.wait_exit(&c, PATIENCE)?;
        let wait = begin.elapsed();
        self.pod.cri.remove(&c)?;
        ensure!(status.exit_code == 7, "{status:?}");
        let copied = fs::read_to_string(dir.join("out"))?;
        ensure!(copied == text, "{copied:?}");
        Ok(wait)
    }

    fn medians(&mut self) -> [Option<Duration>; 2] {
        [&mut self.quiet, &mut self.busy].map(|all| {
            all.sort();
            all.get(all.len() / 2).copied()
        })
    }
}

fn hostile_container(node: &mut Node, handler: &str, rounds: &str) -> Result<()> {
    let place = Path::new(PLACE);
    let _ = fs::remove_dir_all(place);
    fs::create_dir_all(place.join("volume"))?;
    fs::write(place.join("secret-of-the-host"), SECRET)?;
    let image = env::guest_image()?;
    let image_before = digest(&image)?;
    // What the first pod of a kind leaves for the next ones.
    for kind in NEIGHBOURS {
        Neighbour::run(node, kind)?.pod.remove()?;
    }
    let before = Host::settled(node)?;

    let mut neighbours = NEIGHBOURS
        .map(|kind| Neighbour::run(node, kind).with_context(|| format!("neighbour, {kind}")))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;

    let pod = TestPod::run(node, handler, privileged("walls"))?;
    let mut spec = with_privileges(container(
        "c",
        "busybox",
        &["/programs/walls", "/volume", rounds],
    ));
    spec.mounts = vec![
        Mount {
            container_path: "/volume".into(),
            host_path: place.join("volume").to_string_lossy().into_owned(),
            ..Mount::default()
        },
        Mount {
            container_path: "/programs".into(),
            host_path: env::guest_programs()?.to_string_lossy().into_owned(),
            readonly: true,
            ..Mount::default()
        },
    ];
    let c = pod.start(&spec)?;
    let begin = Instant::now();
    while pod.cri.status(&c)?.finished_at == 0 {
        ensure!(
            begin.elapsed() < PATIENCE,
            "it does not end: {:?}",
            log(&pod.config, &spec)
        );
        for neighbour in &mut neighbours {
            let wait = neighbour.answer();
            let wait = wait.with_context(|| format!("neighbour, {}", neighbour.handler))?;
            neighbour.busy.push(wait);
        }
    }
    let (out, err) = log(&pod.config, &spec)?;
    let status = pod.cri.status(&c)?;
    println!("  {handler}: {:.1} s", begin.elapsed().as_secs_f64());
    for neighbour in &mut neighbours {
        let [quiet, busy] = neighbour.medians();
        println!(
            "    {}, beside it: an answer took {quiet:?} before, {busy:?} meanwhile (medians)",
            neighbour.handler
        );
    }
    ensure!(
        status.exit_code == 0 && out.contains("walls: done"),
        "{status:?}\n{out}\n{err}"
    );
    ensure!(!out.contains("ESCAPED"), "{out}");
    // It was inside the wall that it is to try: a privileged container of a Linux guest.
    ensure!(
        handler != OURS || out.contains("guest: share mounted"),
        "{out}"
    );

    // Around the volume, and of what all pods share, nothing has changed.
    let beside = names(place)?;
    ensure!(
        beside == BTreeSet::from(["secret-of-the-host".into(), "volume".into()]),
        "{beside:?}"
    );
    let secret = fs::read_to_string(place.join("secret-of-the-host"))?;
    ensure!(secret == SECRET, "{secret:?}");
    no_devices(&place.join("volume"))?;
    ensure!(
        digest(&image)? == image_before,
        "the guests' image was written"
    );

    // The pod itself goes on, too.
    let again = pod.sleeper("again")?;
    ensure!(pod.sh(&again, "echo well")? == "well\n");
    pod.remove()?;
    for neighbour in neighbours {
        neighbour.pod.remove()?;
    }
    let _ = fs::remove_dir_all(place);
    before.as_before(node).map(drop)
}
