//! The kernel's command line.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Most virtio devices a machine is taken to have.
const MAX_DEVICES: usize = 32;
/// Most arguments of the first program.
const MAX_ARGS: usize = 64;

/// A virtio-mmio device: `virtio_mmio.device=<size>@<address>:<irq>`, as Linux reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Bytes of registers.
    pub size: u64,
    /// Physical address.
    pub address: u64,
    /// IOAPIC pin.
    pub irq: u8,
}

/// What the kernel takes from its command line; words it does not know are for other kernels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Devices in order.
    pub devices: Vec<Device>,
    /// `app.run=PROGRAM` and any number of `app.arg=ARGUMENT`: the first program.
    pub run: Vec<String>,
    /// `app.env=NAME=VALUE`, any number.
    pub env: Vec<String>,
    /// `app.root=TAG`: the virtio-fs share that is its root.
    pub root: String,
    /// `app.cwd=DIRECTORY`.
    pub cwd: String,
    /// `app.memory=BYTES` (or `64K`, `12M`): what the first program and those that it starts may
    /// have, as a container's limit.
    pub memory: Option<u64>,
    /// `app.strace`: print system calls.
    pub strace: bool,
    /// `norandmaps`: programs and their parts are always at the same addresses.
    pub norandmaps: bool,
    /// `quiet`: say nothing about the start.
    pub quiet: bool,
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn device(text: &str) -> Option<Device> {
    let (size, rest) = text.split_once('@')?;
    let (address, irq) = rest.split_once(':')?;
    let size = match size.strip_suffix(['K', 'k']) {
        Some(kib) => number(kib)?.checked_mul(1024)?,
        None => number(size)?,
    };
    Some(Device {
        size,
        address: number(address)?,
        irq: number(irq.split(':').next()?)?.try_into().ok()?,
    })
}

/// `4096`, `64K`, `12M`.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix(['K', 'k']) {
        Some(kib) => (kib, 10),
        None => match text.strip_suffix(['M', 'm']) {
            Some(mib) => (mib, 20),
            None => (text, 0),
        },
    };
    number(digits)?.checked_mul(1 << shift)
}

/// Words of the line; double quotes keep blanks together, as in Linux.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut any) = (false, false);
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                any = true;
            }
            c if c.is_ascii_whitespace() && !quoted => {
                if any {
                    words.push(core::mem::take(&mut word));
                }
                any = false;
            }
            c => {
                word.push(c);
                any = true;
            }
        }
    }
    if any {
        words.push(word);
    }
    words
}

impl Options {
    /// Reads the line.
    pub fn parse(line: &str) -> Self {
        let mut options = Self {
            root: "root".to_string(),
            cwd: "/".to_string(),
            ..Self::default()
        };
        let mut args = Vec::new();
        for word in words(line) {
            let (key, value) = word.split_once('=').unwrap_or((&word, ""));
            match key {
                "virtio_mmio.device" if options.devices.len() < MAX_DEVICES => {
                    options.devices.extend(device(value));
                }
                "app.run" => options.run = alloc::vec![value.to_string()],
                "app.arg" if args.len() < MAX_ARGS => args.push(value.to_string()),
                "app.env" if options.env.len() < MAX_ARGS => options.env.push(value.to_string()),
                "app.root" => options.root = value.to_string(),
                "app.cwd" => options.cwd = value.to_string(),
                "app.memory" => options.memory = bytes(value),
                "app.strace" => options.strace = true,
                "norandmaps" => options.norandmaps = true,
                "quiet" => options.quiet = true,
                _ => {}
            }
        }
        options.run.extend(args);
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_vmm() {
        let line = "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 \
                    virtio_mmio.device=512@0xd0001000:6:1 app.run=/bin/sh app.arg=-c \
                    app.arg=\"echo hi | cat\" \"app.arg=a b\" app.arg= app.root=data app.strace \
                    app.memory=12M";
        let options = Options::parse(line);
        let devices: Vec<_> = options
            .devices
            .iter()
            .map(|d| (d.size, d.address, d.irq))
            .collect();
        assert_eq!(devices, [(4096, 0xd000_0000, 5), (512, 0xd000_1000, 6)]);
        assert_eq!(options.run, ["/bin/sh", "-c", "echo hi | cat", "a b", ""]);
        assert_eq!((options.root.as_str(), options.strace), ("data", true));
        assert_eq!(options.memory, Some(12 << 20));
        assert_eq!(bytes("x"), None);
        assert_eq!((bytes("64k"), bytes("5")), (Some(65536), Some(5)));
    }

    #[test]
    fn nonsense_is_no_device() {
        for bad in [
            "",
            "4K",
            "4K@",
            "4K@x:5",
            "4K@1:300",
            "99999999999999999999@1:1",
        ] {
            assert_eq!(device(bad), None, "{bad}");
        }
        assert_eq!(Options::parse("\"").run.len(), 0);
    }
}
