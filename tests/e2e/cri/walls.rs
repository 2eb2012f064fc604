//! A container that tries to get out (`tests/guest/walls.c`), with all rights that a pod can have.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{APP, Node, OURS};
use bulkhead_tests::cri::proto::Mount;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::{self, PATIENCE};

use super::Test;
use super::failure::{privileged, with_privileges};
use super::host::Host;

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

/// How long a neighbour's answers take, in order.
fn answers(pod: &TestPod, c: &str, count: usize) -> Result<Vec<Duration>> {
    let mut waits = Vec::new();
    for _ in 0..count {
        let begin = Instant::now();
        let answer = pod.sh(c, "cat /tmp/mine")?;
        ensure!(answer == "mine\n", "{answer:?}");
        waits.push(begin.elapsed());
    }
    waits.sort();
    Ok(waits)
}

fn hostile_container(node: &mut Node, handler: &str, rounds: &str) -> Result<()> {
    let place = Path::new(PLACE);
    let _ = fs::remove_dir_all(place);
    fs::create_dir_all(place.join("volume"))?;
    fs::write(place.join("secret-of-the-host"), SECRET)?;
    let image = env::guest_image()?;
    let image_before = digest(&image)?;
    TestPod::run(node, handler, pod("first"))?.remove()?;
    let before = Host::settled(node)?;

    let neighbour = TestPod::run(node, handler, pod("neighbour"))?;
    let calm = neighbour.sleeper("c")?;
    neighbour.sh(&calm, "echo mine > /tmp/mine")?;
    let quiet = answers(&neighbour, &calm, 5)?;

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
    let mut busy = Vec::new();
    let begin = Instant::now();
    while pod.cri.status(&c)?.finished_at == 0 {
        ensure!(
            begin.elapsed() < PATIENCE,
            "it does not end: {:?}",
            log(&pod.config, &spec)
        );
        busy.extend(answers(&neighbour, &calm, 1)?);
    }
    busy.sort();
    let (out, err) = log(&pod.config, &spec)?;
    let status = pod.cri.status(&c)?;
    println!(
        "  {handler}: {:.1} s; the neighbour's answers took {:?} before, {:?} beside it (medians)",
        begin.elapsed().as_secs_f64(),
        quiet.get(quiet.len() / 2),
        busy.get(busy.len() / 2),
    );
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
    neighbour.remove()?;
    let _ = fs::remove_dir_all(place);
    before.as_before(node).map(drop)
}
