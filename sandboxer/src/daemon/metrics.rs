//! Figures for Prometheus: a text of lines, served on a socket that only this host reaches.
//!
//! Nothing is collected between two requests; a request asks every pod, all at once, and leaves
//! out what does not answer in time.

use std::collections::BTreeMap;
use std::fmt::{Debug, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::config::Listen;
use super::controller::{Controller, usage};
use super::pod::Pod;
use super::sandbox::{Figure, Kind, Sandbox};
use crate::timeouts;

/// Largest head of a request.
const MAX_HEAD: usize = 8 << 10;
/// Requests at once; others wait.
const MAX_REQUESTS: usize = 4;
/// Time for a client to say what it wants.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// One metric with all its samples, which have to stand together.
#[derive(Debug)]
struct Family {
    kind: &'static str,
    help: &'static str,
    samples: String,
}

/// A text in the making.
#[derive(Debug, Default)]
pub struct Text(BTreeMap<&'static str, Family>);

impl Text {
    /// Adds one sample.
    pub fn add(&mut self, figure: &Figure, labels: &[(&str, &str)]) {
        let family = self.0.entry(figure.name).or_insert_with(|| Family {
            kind: figure.kind(),
            help: figure.help,
            samples: String::new(),
        });
        let all: Vec<String> = labels
            .iter()
            .chain(figure.label.iter())
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        let labels = match all.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", all.join(",")),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(family.samples, "{}{labels} {}", figure.name, figure.value);
    }

    fn finish(&self) -> String {
        let mut out = String::new();
        for (name, family) in &self.0 {
            let _ = writeln!(out, "# HELP {name} {}", family.help);
            let _ = writeln!(out, "# TYPE {name} {}", family.kind);
            out.push_str(&family.samples);
        }
        out
    }
}

/// Names of pods come from users.
fn escaped(value: &str) -> String {
    let short: String = value.chars().take(256).collect();
    short
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus knows no other numbers"
)]
fn number(value: u64) -> f64 {
    value as f64
}

/// What one pod says.
struct Said {
    state: &'static str,
    sandbox: String,
    names: (String, String),
    containers: usize,
    figures: Vec<Figure>,
}

async fn ask<K: Kind>(pod: Arc<Pod<K>>) -> Said {
    let names = pod.wish.metadata.as_ref();
    let mut said = Said {
        state: match (pod.started(), pod.ended()) {
            (_, Some(_)) => "ended",
            (None, None) => "created",
            (Some(_), None) => "running",
        },
        sandbox: pod.id.clone(),
        names: names.map_or_else(Default::default, |m| (m.namespace.clone(), m.name.clone())),
        containers: pod.containers().len(),
        figures: Vec::new(),
    };
    let Ok(sandbox) = pod.sandbox() else {
        return said;
    };
    said.figures = sandbox.figures();
    let used = tokio::time::timeout(timeouts::figures(), usage(&pod)).await;
    let answers = matches!(used, Ok(Ok(_)));
    said.figures.push(Figure::gauge(
        "bulkhead_pod_answers",
        "Whether the sandbox has told what its containers use, within the time it has for that.",
        f64::from(u8::from(answers)),
    ));
    let Ok(Ok(used)) = used else { return said };
    if let Some(memory) = used.memory {
        said.figures.push(Figure::gauge(
            "bulkhead_pod_memory_bytes",
            "Memory of a pod's containers, as the sandbox counts it.",
            number(memory.usage),
        ));
    }
    if let Some(cpu) = used.cpu {
        said.figures.push(Figure::counter(
            "bulkhead_pod_cpu_seconds_total",
            "CPU time of a pod's containers, as the sandbox counts it.",
            number(cpu.usage_usec) / 1e6,
        ));
    }
    if let Some(pids) = used.pids {
        said.figures.push(Figure::gauge(
            "bulkhead_pod_processes",
            "Processes of a pod's containers.",
            number(pids.current),
        ));
    }
    said
}

/// Pods of one kind, whichever.
pub trait Source: Debug + Send + Sync + 'static {
    /// Adds what they say.
    fn add<'a>(&'a self, text: &'a mut Text) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;
}

impl<K: Kind> Source for Controller<K> {
    fn add<'a>(&'a self, text: &'a mut Text) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(pods(self, text))
    }
}

async fn pods<K: Kind>(controller: &Controller<K>, text: &mut Text) {
    let mut asked = JoinSet::new();
    for pod in controller.all() {
        asked.spawn(ask(pod));
    }
    let runtime = controller.kind().name();
    let mut states = BTreeMap::from([("created", 0u64), ("running", 0), ("ended", 0)]);
    let mut containers = 0;
    while let Some(said) = asked.join_next().await {
        let Ok(said) = said else { continue };
        *states.entry(said.state).or_default() += 1;
        containers += said.containers as u64;
        let labels = [
            ("runtime", runtime),
            ("sandbox", said.sandbox.as_str()),
            ("namespace", said.names.0.as_str()),
            ("pod", said.names.1.as_str()),
        ];
        for figure in &said.figures {
            text.add(figure, &labels);
        }
    }
    for (state, count) in states {
        let mut figure = Figure::gauge("bulkhead_pods", "Pods by where they stand.", number(count));
        figure.label = Some(("state", state));
        text.add(&figure, &[("runtime", runtime)]);
    }
    let figure = Figure::gauge(
        "bulkhead_containers",
        "Containers that have not been removed.",
        number(containers),
    );
    text.add(&figure, &[("runtime", runtime)]);
    let counts = controller.counts();
    for (name, help, value) in [
        (
            "bulkhead_pod_starts_total",
            "Pods that were started since the daemon was.",
            counts.starts,
        ),
        (
            "bulkhead_pod_start_failures_total",
            "Pods that could not be started.",
            counts.failures,
        ),
        (
            "bulkhead_pod_own_ends_total",
            "Pods that ended when nobody had asked for it.",
            counts.own_ends,
        ),
    ] {
        text.add(
            &Figure::counter(name, help, number(value)),
            &[("runtime", runtime)],
        );
    }
    let seconds = Figure::counter(
        "bulkhead_pod_start_seconds_total",
        "Time that all starts of pods took together.",
        counts.start_seconds,
    );
    text.add(&seconds, &[("runtime", runtime)]);
}

fn process(text: &mut Text) {
    let build = Figure::gauge(
        "bulkhead_build_info",
        "Version of the daemon; always 1.",
        1.0,
    );
    text.add(&build, &[("version", env!("CARGO_PKG_VERSION"))]);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    if let Some(kib) = field("VmRSS:") {
        text.add(
            &Figure::gauge(
                "process_resident_memory_bytes",
                "Memory of the daemon, that of its guests included.",
                number(kib.saturating_mul(1024)),
            ),
            &[],
        );
    }
    if let Some(kib) = field("RssAnon:") {
        text.add(
            &Figure::gauge(
                "bulkhead_daemon_anonymous_bytes",
                "Memory of the daemon without files and guests.",
                number(kib.saturating_mul(1024)),
            ),
            &[],
        );
    }
    if let Some(threads) = field("Threads:") {
        text.add(
            &Figure::gauge("process_threads", "Threads of the daemon.", number(threads)),
            &[],
        );
    }
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    text.add(
        &Figure::gauge(
            "process_open_fds",
            "Descriptors of the daemon.",
            number(open as u64),
        ),
        &[],
    );
}

/// All figures as of now.
pub async fn render(all: &[Arc<dyn Source>]) -> String {
    let mut text = Text::default();
    process(&mut text);
    for source in all {
        source.add(&mut text).await;
    }
    text.finish()
}

/// Serves figures for as long as the daemon runs. Needs a tokio runtime.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(listen: &Listen, all: Arc<[Arc<dyn Source>]>) -> std::io::Result<()> {
    let slots = Arc::new(Semaphore::new(MAX_REQUESTS));
    match listen {
        Listen::Unix(path) => {
            let listener = super::bind_private(path)?;
            tokio::spawn(async move {
                loop {
                    let accepted = listener.accept().await.map(|(stream, _)| stream);
                    take(accepted, &slots, &all).await;
                }
            });
        }
        Listen::Loopback(address) => {
            let listener = tokio::net::TcpListener::bind(address).await?;
            tokio::spawn(async move {
                loop {
                    let accepted = listener.accept().await.map(|(stream, _)| stream);
                    take(accepted, &slots, &all).await;
                }
            });
        }
    }
    Ok(())
}

async fn take<S>(accepted: std::io::Result<S>, slots: &Arc<Semaphore>, all: &Arc<[Arc<dyn Source>]>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (Ok(stream), Ok(slot)) = (accepted, Arc::clone(slots).acquire_owned().await) else {
        // Out of descriptors: others must be closed first.
        tokio::time::sleep(Duration::from_millis(100)).await;
        return;
    };
    let all = Arc::clone(all);
    tokio::spawn(async move {
        // A client that has gone is no failure of ours.
        let _ = answer(stream, async { render(&all).await }).await;
        drop(slot);
    });
}

/// One request: `GET /metrics`, in as much HTTP as that needs.
async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    text: impl Future<Output = String>,
) -> std::io::Result<()> {
    let head = tokio::time::timeout(HEAD_TIME, head(&mut stream)).await??;
    let mut words = head.split_whitespace();
    let wanted = (words.next(), words.next());
    let (status, body) = match wanted {
        (Some("GET"), Some("/metrics" | "/metrics/")) => ("200 OK", text.await),
        (Some("GET"), _) => ("404 Not Found", "figures are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    tokio::time::timeout(HEAD_TIME, stream.write_all(answer.as_bytes())).await??;
    stream.shutdown().await
}

async fn head<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<String> {
    let mut all = Vec::new();
    let mut buffer = [0; 1024];
    while !all.windows(4).any(|w| w == b"\r\n\r\n") {
        let n = stream.read(&mut buffer).await?;
        if n == 0 || all.len() > MAX_HEAD {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        all.extend_from_slice(buffer.get(..n).unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&all).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_metric_stand_together() {
        let mut text = Text::default();
        for pod in ["b", "a\"\n"] {
            text.add(&Figure::gauge("x_bytes", "X.", 1.5), &[("pod", pod)]);
            text.add(&Figure::counter("a_total", "A.", 2.0), &[]);
        }
        assert_eq!(
            text.finish(),
            "# HELP a_total A.\n# TYPE a_total counter\na_total 2\na_total 2\n\
             # HELP x_bytes X.\n# TYPE x_bytes gauge\n\
             x_bytes{pod=\"b\"} 1.5\nx_bytes{pod=\"a\\\"\\n\"} 1.5\n"
        );
    }

    async fn asked(request: &[u8]) -> String {
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        theirs.write_all(request).await.expect("write");
        if request.is_empty() {
            theirs.shutdown().await.expect("shutdown");
        }
        let _ = answer(ours, async { "figures\n".to_owned() }).await;
        let mut got = String::new();
        theirs.read_to_string(&mut got).await.expect("read");
        got
    }

    #[tokio::test]
    async fn only_one_thing_is_served() {
        let good = asked(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\nfigures\n"));
        assert!(asked(b"GET / HTTP/1.1\r\n\r\n").await.contains(" 404 "));
        assert!(
            asked(b"POST /metrics HTTP/1.1\r\n\r\n")
                .await
                .contains(" 405 ")
        );
        assert_eq!(asked(b"").await, "");
        assert_eq!(asked(&[b'x'; 20 << 10]).await, "");
    }
}
