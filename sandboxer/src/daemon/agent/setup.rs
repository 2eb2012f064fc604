//! What every sandbox with an agent is told when it starts, and what its agent tells us.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bulkhead_protocol::client::SandboxClient;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{ConfigureSandboxRequest, Dns, EventKind, WaitEventRequest};

use crate::daemon::events::{Event, Events};
use crate::daemon::proto::{PodSandboxConfig, TaskId};
use crate::engine::EngineError;

/// Sysctls that containerd gives every pod with a network of its own, unless its configuration
/// turns them off: users without privilege may ping and open low ports.
pub const USUAL_SYSCTLS: &[(&str, &str)] = &[
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Makes a status of an engine's error.
pub fn failed(error: EngineError) -> Status {
    let code = match &error {
        EngineError::NoGuest { .. } => Code::FailedPrecondition,
        EngineError::GuestHangs { .. } => Code::DeadlineExceeded,
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The pod's host name and name resolution.
pub fn names(id: &str, wish: &PodSandboxConfig) -> ConfigureSandboxRequest {
    let dns = wish.dns_config.as_ref().map(|d| Dns {
        servers: d.servers.clone(),
        searches: d.searches.clone(),
        options: d.options.clone(),
    });
    let empty = |d: &Dns| d.servers.is_empty() && d.searches.is_empty() && d.options.is_empty();
    ConfigureSandboxRequest {
        hostname: match wish.hostname.as_str() {
            "" => id.chars().take(12).collect(),
            name => name.to_owned(),
        },
        // Without a wish: the host's own, as other runtimes do.
        dns: dns.filter(|d| !empty(d)).or_else(host_dns),
        ..ConfigureSandboxRequest::default()
    }
}

/// The pod's sysctls over the usual ones.
pub fn sysctls(usual: &[(&str, &str)], wish: &PodSandboxConfig) -> BTreeMap<String, String> {
    let mut all: BTreeMap<_, _> = usual
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    all.extend(wish.linux.iter().flat_map(|l| l.sysctls.clone()));
    all
}

/// Name resolution of the host.
fn host_dns() -> Option<Dns> {
    let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    let mut dns = Dns::default();
    for line in text.lines().take(100) {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words.next()),
            Some("search") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    // In the pod, its own loopback would be asked.
    dns.servers
        .retain(|s| s.parse().is_ok_and(|ip: IpAddr| !ip.is_loopback()));
    Some(dns)
}

/// Passes on what only the agent knows.
pub async fn watch_events(sandbox: SandboxClient, events: Events, namespace: String) {
    let mut after = 0;
    loop {
        let request = WaitEventRequest {
            after,
            timeout_ms: 0,
        };
        let Ok(answer) = sandbox.wait_event(&request).await else {
            return;
        };
        for event in answer.events {
            after = after.max(event.sequence);
            if let Some(EventKind::Oom(oom)) = event.kind {
                let id = TaskId {
                    container_id: oom.container_id,
                };
                events.send(&namespace, Event::Oom(id));
            }
        }
    }
}
