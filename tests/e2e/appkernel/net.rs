//! The app kernel's network: programs in it talk to the host over a tap.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::App;

const PATIENCE: Duration = Duration::from_secs(120);

/// A program that runs and says things.
struct Talker {
    child: Child,
    output: BufReader<ChildStdout>,
    errors: File,
}

impl Talker {
    fn start(app: &App, options: &[&str], program: &[&str]) -> Self {
        let mut all = vec!["--net", "tap"];
        all.extend(options);
        let errors = tempfile::tempfile().unwrap();
        let mut child = app
            .command(&all, program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors.try_clone().unwrap())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            output,
            errors,
        }
    }

    /// Its exit code, and what it wrote to standard error.
    fn end(&mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        (code, self.errors())
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        self.errors.seek(SeekFrom::Start(0)).unwrap();
        self.errors.read_to_string(&mut text).unwrap();
        text
    }

    /// The rest of the next line that starts with a word.
    fn after(&mut self, word: &str) -> String {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).unwrap() == 0 {
                panic!("no line with {word:?} in {seen}{}", self.errors());
            }
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
            seen += &line;
        }
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // Not to be left behind by a test that failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tries again until the deadline: the other side may not be there yet.
fn patiently<T>(what: &str, mut attempt: impl FnMut() -> std::io::Result<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(e) if Instant::now() > end => panic!("{what}: {e}"),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = patiently(&format!("connect to {to}"), || {
        TcpStream::connect_timeout(&to, Duration::from_secs(20))
    });
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The body that a server of HTTP answers.
fn fetch(to: SocketAddr, path: &str) -> Vec<u8> {
    let mut stream = connect(to);
    write!(stream, "GET {path} HTTP/1.0\r\nHost: test\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let head = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let head = head.unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(&answer)));
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{path}");
    answer.split_off(head + 4)
}

fn hex(bytes: &[u8]) -> String {
    let sum = Sha256::digest(bytes);
    sum.iter().map(|b| format!("{b:02x}")).collect()
}

/// The host's tap: the only one there is.
fn tap() -> u32 {
    let names = fs::read_dir("/sys/class/net").unwrap().flatten();
    let name = names
        .map(|e| e.file_name().into_string().unwrap())
        .find(|n| n.starts_with("bulkhead"))
        .expect("a tap of vmmctl");
    nix::net::if_::if_nametoindex(name.as_str()).unwrap()
}

/// Asks for an echo; whether it came.
fn ping(to: Ipv4Addr) -> bool {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
        setsockopt, socket, sockopt,
    };
    use std::os::fd::AsRawFd;
    let raw = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Icmp,
    )
    .unwrap();
    let limit = nix::sys::time::TimeVal::new(60, 0);
    setsockopt(&raw, sockopt::ReceiveTimeout, &limit).unwrap();
    // Type 8, a number that is ours; the sum of all words is all ones.
    let number = 0x4242u16;
    let sum = !(0x0800 + number);
    let mut request = vec![8, 0];
    request.extend(sum.to_be_bytes());
    request.extend(number.to_be_bytes());
    request.extend([0, 0]);
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
    sendto(raw.as_raw_fd(), &request, &to, MsgFlags::empty()).unwrap();
    let mut answer = [0; 200];
    // Others' packets may come too; ours is behind a header of 20 bytes.
    while let Ok(n) = recv(raw.as_raw_fd(), &mut answer, MsgFlags::empty()) {
        if n == 28 && answer[20] == 0 && answer[24..26] == number.to_be_bytes() {
            return true;
        }
    }
    false
}

const NGINX: &str = r#"
sed -i 's/listen 80 default_server;/listen 80 default_server; listen [::]:80 default_server;/' \
    /etc/nginx/nginx.conf
echo four $(ip -o addr show dev eth0 | awk '$3 == "inet" { print $4 }')
echo six $(ip -o addr show dev eth0 | awk '$3 == "inet6" { print $4 }')
echo sum $(sha256sum /var/www/html/blob)
exec nginx -g 'daemon off;'
"#;

#[test]
fn nginx_serves_files_to_the_host_over_ipv4_and_ipv6() {
    let app = App::new("nginx");
    let mut nginx = Talker::start(&app, &["--name", "web"], &["sh", "-c", NGINX]);
    let four = nginx.after("four");
    let four: Ipv4Addr = four.strip_suffix("/30").expect(&four).parse().unwrap();
    let six = nginx.after("six");
    let six: Ipv6Addr = six.strip_suffix("/64").expect(&six).parse().unwrap();
    let sum = nginx.after("sum");
    let sum = sum.split(' ').next().unwrap();
    let six = SocketAddrV6::new(six, 80, 0, tap());
    assert!(ping(four), "no echo");
    for to in [(four, 80).into(), SocketAddr::V6(six)] {
        assert_eq!(fetch(to, "/health"), b"healthy\n");
        let blob = fetch(to, "/blob");
        assert_eq!((blob.len(), hex(&blob).as_str()), (4 << 20, sum), "{to}");
    }
    // Many at once, and clients that go away in the middle.
    let clients: Vec<_> = (0..20)
        .map(|i| {
            std::thread::spawn(move || {
                let to = SocketAddr::from((four, 80));
                if i % 4 == 0 {
                    let mut stream = connect(to);
                    write!(stream, "GET /blob HTTP/1.0\r\n\r\n").unwrap();
                    let mut some = [0; 1000];
                    stream.read_exact(&mut some).unwrap();
                } else {
                    assert_eq!(fetch(to, "/health"), b"healthy\n");
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    // Nobody listens there: refused, not lost.
    let refused = TcpStream::connect_timeout(&(four, 81).into(), PATIENCE);
    assert_eq!(
        refused.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionRefused
    );
    assert_eq!(fetch((four, 80).into(), "/health"), b"healthy\n");
}

/// The client, then the server. Arguments: ports of the host's servers.
const CLIENT: &str = r#"
import errno, hashlib, select, socket, struct, sys
tcp, udp, closed = map(int, sys.argv[1:])
rows = [l.split() for l in open("/proc/net/route")][1:]
gateway = [r[2] for r in rows if r[1] == "00000000"][0]
host = socket.inet_ntoa(struct.pack("<I", int(gateway, 16)))
print("names", [n for _, n in socket.if_nameindex()])

c = socket.create_connection((host, tcp))
own = c.getsockname()[0]
print("peer", c.getpeername() == (host, tcp))
digest, count = hashlib.sha256(), 0
while data := c.recv(65536):
    digest.update(data)
    count += len(data)
print("down", count, digest.hexdigest())
c.close()

c = socket.create_connection((host, tcp))
c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
c.sendall(b"up" * 300000)
c.shutdown(socket.SHUT_WR)
print("up", sum(len(d) for d in iter(lambda: c.recv(65536), b"")))
c.close()

for port in (closed, tcp):
    c = socket.socket()
    c.setblocking(False)
    assert c.connect_ex((host, port)) == errno.EINPROGRESS
    poll = select.poll()
    poll.register(c, select.POLLOUT)
    assert poll.poll(60000)
    print("async", errno.errorcode.get(c.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "done"))
    c.close()

u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.settimeout(60)
for size in (0, 10, 1400, 5000):
    u.sendto(b"x" * size, (host, udp))
    data, peer = u.recvfrom(65536)
    assert data == b"x" * size and peer == (host, udp), (len(data), peer)
print("echo", size)
u.connect((host, closed))
u.send(b"nobody")
try:
    u.recv(10)
except ConnectionRefusedError:
    print("udp refused")
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.bind(("", 0))
u.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50000))
try:
    u.recv(10)
except BlockingIOError:
    print("time over")
try:
    socket.create_connection(("127.0.0.1", closed))
except ConnectionRefusedError:
    print("loopback refused")

# One socket, reached from the host and from inside.
s = socket.create_server(("", 0))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.bind(("", s.getsockname()[1]))
inside = [socket.create_connection((ip, s.getsockname()[1])) for ip in ("127.0.0.1", own)]
for c in inside:
    a, peer = s.accept()
    a.sendall(b"inside")
    assert c.recv(100) == b"inside" and peer == c.getsockname()
    a.close()
print("serving", own, s.getsockname()[1], flush=True)
data, peer = u.recvfrom(65536)
u.sendto(data[::-1], peer)
a, peer = s.accept()
while data := a.recv(65536):
    a.sendall(data)
a.close()
print("over")
"#;

#[test]
fn a_program_talks_to_the_host_by_tcp_and_udp() {
    let app = App::new("python3");
    let noise: Vec<u8> = (0..3_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let sum = hex(&noise);
    // A client that says nothing gets the file, one that does gets told how much that was.
    let server = TcpListener::bind("0.0.0.0:0").unwrap();
    let tcp = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for (i, client) in server.incoming().flatten().enumerate() {
            let mut client = client;
            let served = if i == 0 {
                client.write_all(&noise)
            } else {
                std::io::copy(&mut client.try_clone().unwrap(), &mut client).map(|_| ())
            };
            assert!(served.is_ok() || i > 1, "{served:?}");
        }
    });
    let echo = UdpSocket::bind("0.0.0.0:0").unwrap();
    let udp = echo.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok((n, from)) = echo.recv_from(&mut buffer) {
            echo.send_to(&buffer[..n], from).unwrap();
        }
    });
    // A port that nobody has: it was just given back.
    let closed = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap();
    let ports = [tcp, udp, closed.port()].map(|p| p.to_string());
    let mut program = vec!["python3", "-I", "-c", CLIENT];
    program.extend(ports.iter().map(String::as_str));
    let mut client = Talker::start(&app, &[], &program);
    assert_eq!(client.after("names"), "['lo', 'eth0']");
    assert_eq!(client.after("peer"), "True");
    assert_eq!(client.after("down"), format!("3000000 {sum}"));
    assert_eq!(client.after("up"), "600000");
    assert_eq!(client.after("async"), "ECONNREFUSED");
    assert_eq!(client.after("async"), "done");
    assert_eq!(client.after("echo"), "5000");
    client.after("udp refused");
    client.after("time over");
    client.after("loopback refused");
    let serving = client.after("serving");
    let (own, port) = serving.split_once(' ').unwrap();
    let to: SocketAddr = format!("{own}:{port}").parse().unwrap();

    let u = UdpSocket::bind("0.0.0.0:0").unwrap();
    u.set_read_timeout(Some(PATIENCE)).unwrap();
    u.send_to(b"from the host", to).unwrap();
    let mut buffer = [0; 100];
    let (n, from) = u.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..n], from), (&b"tsoh eht morf"[..], to));

    let mut stream = connect(to);
    stream.write_all(&[7; 100_000]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert_eq!(back.len(), 100_000);
    client.after("over");
    assert_eq!(client.end(), (Some(0), String::new()));
}

/// Asks for echoes: the loopback, this machine, the host; by both kinds of sockets.
const PINGS: &str = r#"
import errno, os, socket, struct
rows = [l.split() for l in open("/proc/net/route")][1:]
gateway = [r[2] for r in rows if r[1] == "00000000"][0]
host = socket.inet_ntoa(struct.pack("<I", int(gateway, 16)))
c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
c.connect((host, 9))
own = c.getsockname()[0]

def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff

IP_RECVTTL = 12
for where in "127.0.0.1", own, host:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    s.settimeout(60)
    s.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    for size in (0, 56, 3000):
        s.sendto(struct.pack("!BBHHH", 8, 0, 0, 0, size) + b"p" * size, (where, 0))
        data, control, _, peer = s.recvmsg(4000, 100)
        kind, _, _, ident, place = struct.unpack("!BBHHH", data[:8])
        assert (kind, ident, place) == (0, s.getsockname()[1], size), (kind, ident, place)
        assert data[8:] == b"p" * size and peer == (where, 0), peer
        assert [(c[0], c[1], struct.unpack("i", c[2])) for c in control] == [(0, 2, (64,))], control
    r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    r.settimeout(60)
    request = struct.pack("!BBHHH", 8, 0, 0, 0x1234, 7) + b"raw."
    request = request[:2] + struct.pack("!H", checksum(request)) + request[4:]
    r.sendto(request, (where, 0))
    while True:
        data, peer = r.recvfrom(4000)
        if data[20] == 0:
            break
    assert data[0] == 0x45 and data[9] == 1 and peer == (where, 0), data
    assert data[24:] == request[4:], data
    print("answered", where == host)
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, 58)
six.settimeout(60)
six.sendto(struct.pack("!BBHHH", 128, 0, 0, 0, 1) + b"six", ("::1", 0))
assert six.recv(100)[0] == 129
try:
    s.sendto(b"\0" * 8, (host, 0))
except OSError as e:
    print("no request", errno.errorcode[e.errno])
os.setuid(1000)
try:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
except PermissionError:
    print("not for everybody")
socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
print("over")
"#;

#[test]
fn a_program_pings_itself_and_the_host() {
    let app = App::new("python3");
    let mut pings = Talker::start(&app, &[], &["python3", "-I", "-c", PINGS]);
    for host in ["False", "False", "True"] {
        assert_eq!(pings.after("answered"), host);
    }
    assert_eq!(pings.after("no request"), "EINVAL");
    pings.after("not for everybody");
    pings.after("over");
    assert_eq!(pings.end(), (Some(0), String::new()));
    drop(app);
    let app = App::new("busybox");
    let script =
        "ping -c 2 -W 60 127.0.0.1; ping -c 2 -W 60 $(ip route | awk '/default/ { print $3 }')";
    let mut ping = Talker::start(&app, &[], &["sh", "-c", script]);
    for _ in 0..2 {
        assert!(
            ping.after("2 packets transmitted")
                .contains("2 packets received")
        );
    }
    assert_eq!(ping.end(), (Some(0), String::new()));
}

#[test]
fn the_interface_is_shown_as_linux_shows_it() {
    let app = App::new("busybox");
    let script = "ip addr; ip route; ifconfig eth0; cat /proc/net/dev /proc/net/route; \
        cat /sys/class/net/eth0/address; route -n; netstat -tln";
    let (code, text, errors) = app.run(&["--net", "tap"], &["sh", "-c", script], b"");
    assert_eq!(code, 0, "{text} {errors}");
    for wanted in [
        "1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536",
        "inet 127.0.0.1/8 scope host lo",
        "2: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500",
        "link/ether 02:b7:",
        "inet 172.31.",
        "inet6 fe80::b7:",
        "default via 172.31.",
        "Mask:255.255.255.252",
        "HWaddr 02:B7:",
        "eth0\t00000000\t",
    ] {
        assert!(text.contains(wanted), "no {wanted:?} in {text}");
    }
}
