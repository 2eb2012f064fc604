// SPDX-License-Identifier: Apache-2.0
//! PID 1 of the lab's Linux host: boots it, runs one command, reports its end.
//!
//! Static, without crates, compiled by plain `rustc` when the lab is prepared. It runs as PID 1
//! from the initramfs and stays PID 1; there is no systemd and no udev. See ../README.md for the
//! protocol with the driver.

mod boot;
mod job;
mod sys;

use job::{Control, Job};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Must equal PROTOCOL of the driver: a stale initramfs is noticed instead of misunderstood.
const PROTOCOL: u32 = 1;

/// Opens the virtio-serial port of that name.
fn port(name: &str) -> io::Result<File> {
    // The driver adds the ports by messages from the device, shortly after PCI probing.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let label = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if label.trim() == name {
                let dev = format!("/dev/{}", entry.file_name().to_string_lossy());
                match OpenOptions::new().read(true).write(true).open(dev) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    other => return other,
                }
            }
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "no virtio-serial port named {name}"
            )));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn uptime() -> String {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

fn live(ctl: &Control, reader: File) -> io::Result<(i32, u64, u64)> {
    let mut reader = BufReader::new(reader);
    ctl.say(&format!("READY {PROTOCOL} {}", uptime()));
    let job = Job::read(&mut reader)?;
    let beat = ctl.clone();
    sys::favour_self(); // before the first thread, so that all of them inherit it
    thread::spawn(move || {
        sys::name_thread("heartbeat");
        loop {
            beat.say(&format!("HB {}", uptime()));
            thread::sleep(Duration::from_secs(1));
        }
    });
    sys::set_clock(job.clock_ns);
    let noter = ctl.clone();
    let mut log = |text: &str| noter.say(&format!("NOTE {text}"));
    let stage = |name: &str| ctl.say(&format!("STAGE {name} {}", uptime()));
    boot::modules(&mut log)?;
    stage("modules");
    boot::root()?;
    stage("root");
    boot::mounts(&job.shares, &job.modules_dir)?;
    stage("mounts");
    boot::settings(&mut log);
    ctl.say(&format!("BOOTED {}", uptime()));
    let result = job::run(&job, reader, ctl, port)?;
    // Pages written through mmap reach the host's files only now.
    sys::sync_all();
    Ok(result)
}

fn main() {
    let result = boot::early().and_then(|()| port("ctl"));
    let file = match result {
        Ok(file) => file,
        Err(e) => {
            // Nobody to talk to: the console is all there is, and the driver reads it.
            eprintln!("lab-init: cannot start: {e}");
            sys::power_off();
        }
    };
    let ctl = match file.try_clone() {
        Ok(f) => Control(Arc::new(Mutex::new(f))),
        Err(_) => sys::power_off(),
    };
    match live(&ctl, file) {
        Ok((code, out, err)) => ctl.say(&format!("EXIT {code} {out} {err}")),
        Err(e) => ctl.say(&format!("BROKEN {e}")),
    }
    // The driver ends the emulator when it has read the line; this is for when it does not.
    thread::sleep(Duration::from_secs(30));
    sys::power_off();
}
