//! Names to addresses, asked by sockets of the calling thread.
//!
//! The host's resolver library would read the host's configuration and ask from whatever thread it
//! likes. A pod's names are answered by the servers of its own resolv.conf, through its own
//! network namespace: look-ups run on the pod's threads only.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// Limits of resolv.conf(5).
const MAX_SERVERS: usize = 3;
const MAX_SEARCH: usize = 32;
/// Addresses kept of one name.
const MAX_ADDRESSES: usize = 64;
/// Lines read of /etc/hosts.
const MAX_HOSTS: usize = 10_000;
/// Largest name, RFC 1035.
const MAX_NAME: usize = 253;
/// Answers by UDP beyond 512 bytes come with EDNS only, which is not asked for; some servers send
/// them nevertheless.
const MAX_DATAGRAM: usize = 4096;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is no name.
    #[error("not a valid name")]
    Invalid,
    /// The servers say that it does not exist.
    #[error("name does not exist")]
    NotFound,
    /// No server answered usefully.
    #[error("no name server answers")]
    Unavailable,
    /// There is nobody to ask.
    #[error("the pod has no name servers")]
    NoServers,
}

/// A pod's resolv.conf and hosts file.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    servers: Vec<SocketAddr>,
    search: Vec<String>,
    ndots: usize,
    timeout: Duration,
    attempts: usize,
    hosts: HashMap<String, Vec<IpAddr>>,
}

impl Resolver {
    /// Knows `localhost` and nothing else.
    pub fn none() -> Self {
        Self::parse("", "")
    }

    /// Reads the pod's files. A file that is missing counts as empty.
    ///
    /// # Errors
    /// A file that exists cannot be read.
    pub fn from_files(resolv_conf: Option<&Path>, hosts: Option<&Path>) -> io::Result<Self> {
        let read = |path: Option<&Path>| match path.map(std::fs::read) {
            None => Ok(String::new()),
            Some(Err(e)) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Some(Err(e)) => Err(e),
            Some(Ok(text)) => Ok(String::from_utf8_lossy(&text).into_owned()),
        };
        Ok(Self::parse(&read(resolv_conf)?, &read(hosts)?))
    }

    /// From the files' contents; lines that make no sense are skipped, as the C library does.
    pub fn parse(resolv_conf: &str, hosts: &str) -> Self {
        let mut this = Self {
            ndots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
            ..Self::default()
        };
        for line in resolv_conf.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if this.servers.len() < MAX_SERVERS => {
                    if let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) {
                        this.servers.push(SocketAddr::new(address, 53));
                    }
                }
                Some("search" | "domain") => {
                    this.search = words
                        .take(MAX_SEARCH)
                        .map(|s| s.trim_end_matches('.').to_ascii_lowercase())
                        .collect();
                }
                Some("options") => {
                    for option in words {
                        let number = |name: &str| option.strip_prefix(name)?.parse::<u8>().ok();
                        if let Some(n) = number("ndots:") {
                            this.ndots = usize::from(n.min(15));
                        } else if let Some(n) = number("timeout:") {
                            this.timeout = Duration::from_secs(u64::from(n.clamp(1, 30)));
                        } else if let Some(n) = number("attempts:") {
                            this.attempts = usize::from(n.clamp(1, 5));
                        }
                    }
                }
                _ => {}
            }
        }
        for line in hosts.lines().take(MAX_HOSTS) {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) else {
                continue;
            };
            for name in words {
                let list = this.hosts.entry(name.to_ascii_lowercase()).or_default();
                if list.len() < MAX_ADDRESSES {
                    list.push(address);
                }
            }
        }
        this
    }

    /// The addresses of a name, or of an address written as a name.
    ///
    /// # Errors
    /// See [`NameError`].
    pub async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, NameError> {
        let bare = name
            .strip_prefix('[')
            .and_then(|n| n.strip_suffix(']'))
            .unwrap_or(name);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(vec![address]);
        }
        let absolute = name.ends_with('.');
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if !valid(&name) {
            return Err(NameError::Invalid);
        }
        if let Some(addresses) = self.hosts.get(&name) {
            return Ok(addresses.clone());
        }
        if name == "localhost" || name.ends_with(".localhost") {
            return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
        }
        if self.servers.is_empty() {
            return Err(NameError::NoServers);
        }
        let mut last = NameError::NotFound;
        for candidate in self.candidates(&name, absolute) {
            match self.ask(&candidate).await {
                Ok(addresses) if !addresses.is_empty() => return Ok(addresses),
                Ok(_) => {}
                Err(NameError::NotFound) => {}
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn candidates(&self, name: &str, absolute: bool) -> Vec<String> {
        let mut list: Vec<String> = Vec::new();
        if !absolute {
            list.extend(self.search.iter().map(|s| format!("{name}.{s}")));
        }
        if absolute || name.matches('.').count() >= self.ndots {
            list.insert(0, name.to_owned());
        } else {
            list.push(name.to_owned());
        }
        list.retain(|n| valid(n));
        list
    }

    async fn ask(&self, name: &str) -> Result<Vec<IpAddr>, NameError> {
        let mut last = NameError::Unavailable;
        for _ in 0..self.attempts {
            for server in &self.servers {
                let (v4, v6) = tokio::join!(
                    self.query(*server, name, TYPE_A),
                    self.query(*server, name, TYPE_AAAA)
                );
                match (v4, v6) {
                    (Ok(mut v4), Ok(v6)) => {
                        v4.extend(v6);
                        return Ok(v4);
                    }
                    (Ok(some), Err(_)) | (Err(_), Ok(some)) if !some.is_empty() => return Ok(some),
                    (Err(NameError::NotFound), _) | (_, Err(NameError::NotFound)) => {
                        return Err(NameError::NotFound);
                    }
                    (Err(e), _) | (_, Err(e)) => last = e,
                }
            }
        }
        Err(last)
    }

    async fn query(
        &self,
        server: SocketAddr,
        name: &str,
        kind: u16,
    ) -> Result<Vec<IpAddr>, NameError> {
        let id = random_id();
        let question = question(id, name, kind).ok_or(NameError::Invalid)?;
        let exchange = async {
            let any: IpAddr = match server {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0)).await?;
            // Connected: the kernel drops what comes from elsewhere.
            socket.connect(server).await?;
            socket.send(&question).await?;
            let mut buffer = vec![0; MAX_DATAGRAM];
            loop {
                let n = socket.recv(&mut buffer).await?;
                let message = buffer.get(..n).unwrap_or_default();
                match answer(message, id, &question, kind) {
                    // Not an answer to this question: somebody guesses. Keep waiting.
                    None => {}
                    Some(Answer::Truncated) => return by_tcp(server, &question, id, kind).await,
                    Some(Answer::Done(result)) => return Ok(result),
                }
            }
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(Ok(result)) => result,
            Ok(Err::<_, io::Error>(_)) | Err(_) => Err(NameError::Unavailable),
        }
    }
}

async fn by_tcp(
    server: SocketAddr,
    question: &[u8],
    id: u16,
    kind: u16,
) -> io::Result<Result<Vec<IpAddr>, NameError>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(question).await?;
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    match answer(&message, id, question, kind) {
        Some(Answer::Done(result)) => Ok(result),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn valid(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

/// Not secret, but not to be guessed by somebody who wants to answer in the server's place.
fn random_id() -> u16 {
    let mut bytes = [0u8; 2];
    // SAFETY: the kernel writes at most two bytes into our two bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == 2 {
        u16::from_be_bytes(bytes)
    } else {
        // The source port is still random.
        0
    }
}

fn question(id: u16, name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 18);
    out.extend(id.to_be_bytes());
    // Recursion desired; one question.
    out.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        out.push(u8::try_from(label.len()).ok().filter(|n| *n < 64)?);
        out.extend(label.as_bytes());
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    Some(out)
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Truncated,
    Done(Result<Vec<IpAddr>, NameError>),
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// The position behind a name; compressed names end with their first pointer.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    for _ in 0..128 {
        match *message.get(at)? {
            0 => return at.checked_add(1),
            n if n & 0xc0 == 0xc0 => return at.checked_add(2),
            n if n & 0xc0 == 0 => at = at.checked_add(usize::from(n) + 1)?,
            _ => return None,
        }
    }
    None
}

/// Reads an answer. `None` if it is not one to this question.
fn answer(message: &[u8], id: u16, question: &[u8], kind: u16) -> Option<Answer> {
    let flags = u16_at(message, 2)?;
    let asked = question.get(12..)?;
    let is_ours = u16_at(message, 0)? == id
        && flags & 0x8000 != 0
        && u16_at(message, 4)? == 1
        && message.get(12..question.len())?.eq_ignore_ascii_case(asked);
    if !is_ours {
        return None;
    }
    if flags & 0x0200 != 0 {
        return Some(Answer::Truncated);
    }
    Some(Answer::Done(match flags & 0xf {
        0 => records(message, question.len(), kind).ok_or(NameError::Unavailable),
        3 => Err(NameError::NotFound),
        _ => Err(NameError::Unavailable),
    }))
}

/// Addresses among the answers, whatever names they have: the chain of aliases is the server's.
fn records(message: &[u8], mut at: usize, kind: u16) -> Option<Vec<IpAddr>> {
    let mut found = Vec::new();
    for _ in 0..u16_at(message, 6)? {
        at = skip_name(message, at)?;
        let record_kind = u16_at(message, at)?;
        let class = u16_at(message, at.checked_add(2)?)?;
        let length = usize::from(u16_at(message, at.checked_add(8)?)?);
        let data_at = at.checked_add(10)?;
        let data = message.get(data_at..data_at.checked_add(length)?)?;
        if record_kind == kind && class == CLASS_IN && found.len() < MAX_ADDRESSES {
            match kind {
                TYPE_A => found.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
                _ => found.push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            }
        }
        at = data_at.checked_add(length)?;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime")
            .block_on(future)
    }

    #[test]
    fn files_are_read_as_the_c_library_does() {
        let r = Resolver::parse(
            "# x\nnameserver 10.0.0.10\nnameserver nonsense\nnameserver fd00::1\n\
             search a.svc.cluster.local svc.cluster.local.\noptions ndots:5 timeout:1 attempts:9\n",
            "127.0.0.1 localhost\n10.1.2.3 db DB.example # db2\n::1\n",
        );
        assert_eq!(r.servers.len(), 2);
        assert_eq!((r.ndots, r.attempts), (5, 5));
        assert_eq!(
            r.candidates("web", false),
            ["web.a.svc.cluster.local", "web.svc.cluster.local", "web"]
        );
        assert_eq!(r.candidates("web", true), ["web"]);
        assert_eq!(
            block_on(r.resolve("db.EXAMPLE")),
            Ok(vec!["10.1.2.3".parse().expect("address")])
        );
        assert_eq!(
            block_on(Resolver::none().resolve("[::1]")),
            Ok(vec![Ipv6Addr::LOCALHOST.into()])
        );
        for bad in ["", "a..b", "a b", "ü", &"x".repeat(64), &"a.".repeat(200)] {
            assert_eq!(
                block_on(Resolver::none().resolve(bad)),
                Err(NameError::Invalid),
                "{bad}"
            );
        }
        assert_eq!(
            block_on(Resolver::none().resolve("example.org")),
            Err(NameError::NoServers)
        );
    }

    /// A server that answers from a script.
    async fn serve(socket: UdpSocket, mut reply: impl FnMut(&[u8]) -> Vec<Vec<u8>>) {
        let mut buffer = [0; 512];
        while let Ok((n, from)) = socket.recv_from(&mut buffer).await {
            for message in reply(&buffer[..n]) {
                let _ = socket.send_to(&message, from).await;
            }
        }
    }

    fn reply(query: &[u8], flags: u16, kind: u16, data: &[u8]) -> Vec<u8> {
        let mut out = query.to_vec();
        out[2..4].copy_from_slice(&flags.to_be_bytes());
        out[6..8].copy_from_slice(&1u16.to_be_bytes());
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1, 0, 0, 0, 9]);
        out.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
        out.extend(data);
        out
    }

    #[test]
    fn asks_servers_and_ignores_forgeries() {
        block_on(async {
            let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bind");
            let mut resolver = Resolver::parse("nameserver 127.0.0.1\nsearch pod.test", "");
            resolver.servers[0] = socket.local_addr().expect("address");
            let server = serve(socket, |query| {
                let kind = u16::from_be_bytes([query[query.len() - 4], query[query.len() - 3]]);
                let mut forged = query.to_vec();
                forged[0] ^= 0xff;
                if kind == TYPE_AAAA {
                    return vec![reply(query, 0x8183, TYPE_A, &[])];
                }
                vec![
                    vec![1, 2, 3],
                    reply(&forged, 0x8180, TYPE_A, &[6, 6, 6, 6]),
                    reply(query, 0x8180, TYPE_A, &[10, 0, 0, 9]),
                ]
            });
            tokio::select! {
                () = server => unreachable!("serves for ever"),
                found = resolver.resolve("db") => {
                    assert_eq!(found, Ok(vec![Ipv4Addr::new(10, 0, 0, 9).into()]));
                }
            }
        });
    }

    #[test]
    fn damaged_answers_are_no_answers() {
        let query = question(7, "a.b", TYPE_A).expect("question");
        let good = reply(&query, 0x8180, TYPE_A, &[1, 2, 3, 4]);
        assert_eq!(
            answer(&good, 7, &query, TYPE_A),
            Some(Answer::Done(Ok(vec![Ipv4Addr::new(1, 2, 3, 4).into()])))
        );
        for cut in 0..good.len() {
            let result = answer(&good[..cut], 7, &query, TYPE_A);
            assert!(
                matches!(result, None | Some(Answer::Done(Err(_)))),
                "cut at {cut}: {result:?}"
            );
        }
        let mut many = good.clone();
        many[6] = 0xff;
        assert_eq!(
            answer(&many, 7, &query, TYPE_A),
            Some(Answer::Done(Err(NameError::Unavailable)))
        );
        let mut truncated = good;
        truncated[2] |= 2;
        assert_eq!(
            answer(&truncated, 7, &query, TYPE_A),
            Some(Answer::Truncated)
        );
    }
}
