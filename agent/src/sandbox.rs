//! The Sandbox service.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bulkhead_protocol::PROTOCOL_VERSION;
use bulkhead_protocol::rpc::Status;
use bulkhead_protocol::sandbox::*;
use bulkhead_protocol::server::SandboxService;
use bulkhead_protocol::types::Empty;
use nix::errno::Errno;
use nix::mount::MsFlags;
use tokio::sync::mpsc;

use crate::boot;
use crate::cgroup;
use crate::error::{Context, Error, Result};
use crate::net;
use crate::spec::ETC_DIR;
use crate::tasks::Tasks;

/// The sandbox's shared memory.
const SHM_DIR: &str = "/run/bulkhead/shm";

/// Random bytes taken in one call; the kernel's pool is smaller.
const MAX_ENTROPY: usize = 512;

/// The service.
pub struct Service {
    /// The containers.
    pub tasks: Arc<Tasks>,
    /// Tells the main loop to go down.
    pub down: mpsc::Sender<()>,
}

type Answer<T> = std::result::Result<T, Status>;

impl SandboxService for Service {
    async fn get_info(&self, _: GetInfoRequest) -> Answer<GetInfoResponse> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut features = vec!["network".to_owned(), "shared-pid".to_owned()];
        if cgroup::available() {
            features.push("cgroup2".to_owned());
            features.push("freezer".to_owned());
        }
        if cfg!(feature = "seccomp") && Path::new("/proc/sys/kernel/seccomp").exists() {
            features.push("seccomp".to_owned());
        }
        if Path::new("/proc/self/ns/time").exists() {
            features.push("time".to_owned());
        }
        Ok(GetInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            kernel: format!("Linux {}", release.trim()),
            boot: boot::stages(),
            monotonic_ns: boot::monotonic_ns(),
            cpus_online: online_cpus(),
            memory_bytes: memory_bytes(),
            features,
            // Linux does not count them.
            unknown_calls: None,
        })
    }

    async fn check(&self, _: Empty) -> Answer<Empty> {
        Ok(Empty {})
    }

    async fn configure_sandbox(
        &self,
        request: ConfigureSandboxRequest,
    ) -> Answer<ConfigureSandboxResponse> {
        let mut warnings = Vec::new();
        configure(&self.tasks, &request, &mut warnings)?;
        boot::reached("configured");
        Ok(ConfigureSandboxResponse { warnings })
    }

    async fn set_time(&self, request: SetTimeRequest) -> Answer<Empty> {
        only_in_guest("the clock")?;
        if request.nanos > 999_999_999 {
            return Err(Error::Invalid("nanos must be below 1,000,000,000".to_owned()).into());
        }
        let time = nix::sys::time::TimeSpec::new(request.seconds, i64::from(request.nanos));
        nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time)
            .context(|| "set the wall clock".to_owned())?;
        Ok(Empty {})
    }

    async fn add_entropy(&self, request: AddEntropyRequest) -> Answer<Empty> {
        only_in_guest("the random generator")?;
        add_entropy(&request.data)?;
        Ok(Empty {})
    }

    async fn online_resources(
        &self,
        request: OnlineResourcesRequest,
    ) -> Answer<OnlineResourcesResponse> {
        only_in_guest("CPUs and memory")?;
        if request.cpus > 0 {
            set_online_cpus(request.cpus)?;
        }
        let memory_blocks = if request.memory { online_memory() } else { 0 };
        Ok(OnlineResourcesResponse {
            cpus_online: online_cpus(),
            memory_blocks,
        })
    }

    async fn wait_event(&self, request: WaitEventRequest) -> Answer<WaitEventResponse> {
        let timeout =
            (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms.into()));
        let events = self.tasks.events.wait(request.after, timeout).await;
        Ok(WaitEventResponse { events })
    }

    async fn shutdown(&self, request: ShutdownRequest) -> Answer<Empty> {
        let tasks = self.tasks.clone();
        let down = self.down.clone();
        let grace = Duration::from_millis(request.grace_ms.into());
        tokio::spawn(async move {
            end_all(&tasks, grace).await;
            let _ = down.send(()).await;
        });
        Ok(Empty {})
    }
}

/// What belongs to the whole machine is ours to change in a guest, and in none of a host.
fn only_in_guest(what: &str) -> Result<()> {
    match crate::in_guest() || crate::testing() {
        true => Ok(()),
        false => Err(Error::Unsupported(format!(
            "{what}: not ours to change on a host"
        ))),
    }
}

/// Ends all containers: SIGTERM, `grace`, SIGKILL.
async fn end_all(tasks: &Tasks, grace: Duration) {
    let containers = tasks.all();
    if !grace.is_zero() {
        for container in &containers {
            let _ = container.kill("", libc::SIGTERM as u32, false);
        }
        let ended = async {
            for container in &containers {
                let _ = container.wait("").await;
            }
        };
        let _ = tokio::time::timeout(grace, ended).await;
    }
    // A process stuck in the kernel must not hold the shutdown.
    let killed = async {
        for container in &containers {
            container.end().await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(10), killed).await;
}

fn configure(
    tasks: &Tasks,
    request: &ConfigureSandboxRequest,
    warnings: &mut Vec<String>,
) -> Result<()> {
    for share in &request.shares {
        tasks
            .shares
            .mount(&share.tag, &share.path, &share.options)?;
    }
    make_shared_memory()?;
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .context(|| format!("set the host name to {:?}", request.hostname))?;
    }
    write_etc(request)?;
    for (name, value) in &request.sysctls {
        match set_sysctl(name, value) {
            Ok(()) => {}
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                warnings.push(format!("sysctl {name} does not exist in this guest"));
            }
            Err(error) => return Err(error),
        }
    }
    net::configure(&request.interfaces, &request.routes, &request.neighbours)
}

/// Shared memory of all containers that want to share it: they bind it to /dev/shm.
fn make_shared_memory() -> Result<()> {
    if crate::testing() || Path::new(SHM_DIR).exists() {
        return Ok(());
    }
    fs::create_dir_all(SHM_DIR).context(|| format!("make {SHM_DIR}"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = Some("mode=1777,size=65536k");
    nix::mount::mount(Some("shm"), SHM_DIR, Some("tmpfs"), flags, data)
        .context(|| format!("mount a tmpfs at {SHM_DIR}"))
}

/// Text for a file: no line of it may become two.
fn one_line(kind: &str, text: &str) -> Result<()> {
    if text.is_empty() || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Error::Invalid(format!("{kind} {text:?} must be one word")));
    }
    Ok(())
}

fn write_etc(request: &ConfigureSandboxRequest) -> Result<()> {
    fs::create_dir_all(ETC_DIR).context(|| format!("make {ETC_DIR}"))?;
    let write = |name: &str, text: &str| {
        fs::write(Path::new(ETC_DIR).join(name), text).context(|| format!("write {name}"))
    };
    if !request.hostname.is_empty() {
        write("hostname", &format!("{}\n", request.hostname))?;
    }
    if let Some(dns) = &request.dns {
        let mut text = String::new();
        for server in &dns.servers {
            one_line("name server", server)?;
            text.push_str(&format!("nameserver {server}\n"));
        }
        for (keyword, words) in [("search", &dns.searches), ("options", &dns.options)] {
            for word in words {
                one_line(keyword, word)?;
            }
            if !words.is_empty() {
                text.push_str(&format!("{keyword} {}\n", words.join(" ")));
            }
        }
        write("resolv.conf", &text)?;
    }
    if !request.hosts.is_empty() {
        write("hosts", &request.hosts)?;
    } else if !request.hostname.is_empty() {
        let mut text =
            String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        let address = request
            .interfaces
            .iter()
            .flat_map(|i| &i.addresses)
            .next()
            .and_then(|a| a.split('/').next())
            .unwrap_or("127.0.1.1");
        text.push_str(&format!("{address}\t{}\n", request.hostname));
        write("hosts", &text)?;
    }
    Ok(())
}

/// Sets a sysctl given with dots or slashes.
fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let relative = if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    let plain = relative
        .split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..");
    if !plain || relative.contains('\0') {
        return Err(Error::Invalid(format!("sysctl {name:?} is not a name")));
    }
    fs::write(PathBuf::from("/proc/sys").join(relative), value)
        .context(|| format!("set sysctl {name} to {value:?}"))
}

fn add_entropy(data: &[u8]) -> Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        data: [u8; MAX_ENTROPY],
    }

    if data.is_empty() || data.len() > MAX_ENTROPY {
        return Err(Error::Invalid(format!(
            "entropy must be 1 to {MAX_ENTROPY} bytes, not {}",
            data.len()
        )));
    }
    let length = libc::c_int::try_from(data.len()).unwrap_or(0);
    let mut pool = Pool {
        entropy_bits: length * 8,
        bytes: length,
        data: [0; MAX_ENTROPY],
    };
    for (slot, byte) in pool.data.iter_mut().zip(data) {
        *slot = *byte;
    }
    let what = || "feed the kernel's random generator".to_owned();
    let random = fs::File::options()
        .write(true)
        .open("/dev/random")
        .context(what)?;
    use std::os::fd::AsRawFd;
    // SAFETY: RNDADDENTROPY reads two ints and as many bytes as the second says, which is at most
    // the array's length; the struct lives through the call.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) })
        .context(what)?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).context(what)?;
    Ok(())
}

fn online_cpus() -> u32 {
    // SAFETY: sysconf takes a number.
    let n = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    u32::try_from(n).unwrap_or(1)
}

fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| {
            let rest = line.strip_prefix("MemTotal:")?;
            rest.split_whitespace().next()?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// Makes the first `wanted` CPUs online, and those after them offline.
fn set_online_cpus(wanted: u32) -> Result<()> {
    // cpu0 has no such file: it is always online.
    for n in 1..1024u32 {
        let file = PathBuf::from(format!("/sys/devices/system/cpu/cpu{n}/online"));
        let Ok(now) = fs::read_to_string(&file) else {
            break;
        };
        let want = if n < wanted { "1" } else { "0" };
        if now.trim() != want {
            fs::write(&file, want).context(|| format!("set cpu{n} online to {want}"))?;
        }
    }
    Ok(())
}

fn online_memory() -> u32 {
    let mut count = 0;
    for entry in fs::read_dir("/sys/devices/system/memory")
        .into_iter()
        .flatten()
        .flatten()
    {
        let state = entry.path().join("state");
        if fs::read_to_string(&state).is_ok_and(|s| s.trim() == "offline")
            && fs::write(&state, "online").is_ok()
        {
            count += 1;
        }
    }
    count
}

/// Whether the wall clock is obviously wrong; logged once at boot.
pub fn clock_is_unset() -> bool {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .is_ok_and(|d| d < Duration::from_secs(1_600_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_stay_below_proc_sys() {
        for bad in ["", "../x", "a..b", "a/../b", "/etc/passwd", "a//b"] {
            assert!(
                matches!(set_sysctl(bad, "1"), Err(Error::Invalid(_))),
                "{bad}"
            );
        }
        let Err(Error::Io { source, .. }) = set_sysctl("no.such.sysctl", "1") else {
            panic!("expected an error of the kernel")
        };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn words_for_etc_are_single() {
        assert!(one_line("x", "10.0.0.1").is_ok());
        for bad in ["", "a b", "a\nb", "\u{1b}"] {
            assert!(one_line("x", bad).is_err());
        }
    }
}
