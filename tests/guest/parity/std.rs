//! Rust's standard library: threads, channels, processes, files, sockets, panics.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

fn threads() {
    let total = Arc::new(Mutex::new(BTreeMap::new()));
    let barrier = Arc::new(Barrier::new(8));
    let handles: Vec<_> = (0..8u64)
        .map(|number| {
            let (total, barrier) = (Arc::clone(&total), Arc::clone(&barrier));
            thread::spawn(move || {
                barrier.wait();
                let sum = (0..1000 * (number + 1)).sum::<u64>();
                total.lock().unwrap().insert(number, sum);
                sum
            })
        })
        .collect();
    let sums: Vec<u64> = handles.into_iter().map(|h| h.join().unwrap()).collect();
    println!("threads: {sums:?} {:?}", total.lock().unwrap());
    let (sender, receiver) = channel();
    let producers: Vec<_> = (0..4)
        .map(|i| {
            let sender = sender.clone();
            thread::spawn(move || (0..100).for_each(|n| sender.send(i * 100 + n).unwrap()))
        })
        .collect();
    producers.into_iter().for_each(|p| p.join().unwrap());
    println!("channel: {}", receiver.try_iter().sum::<i32>());
    let late = receiver.recv_timeout(Duration::from_millis(20));
    println!("late: {:?}", late == Err(RecvTimeoutError::Timeout));
    println!("panic: {}", thread::spawn(|| panic!("on purpose")).join().is_err());
    let begin = Instant::now();
    thread::sleep(Duration::from_millis(20));
    println!("slept: {}", begin.elapsed() >= Duration::from_millis(20));
}

fn processes() {
    let me = std::env::current_exe().unwrap();
    let child = |what: &str| {
        let mut command = Command::new(&me);
        command.arg(what).env("GIVEN", "by the parent");
        command
    };
    let output = child("speak").output().unwrap();
    println!("spoke: {:?} {:?} {:?}", output.status.code(), String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let mut echo = child("echo").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = echo.stdin.take().unwrap();
    let writer = thread::spawn(move || (0..5000).for_each(|i| writeln!(input, "line {i}").unwrap()));
    let lines = BufReader::new(echo.stdout.take().unwrap()).lines().count();
    writer.join().unwrap();
    println!("echoed: {lines} {:?}", echo.wait().unwrap().code());
    println!("panicked: {:?}", child("panic").stderr(Stdio::null()).status().unwrap().code());
    println!("aborted: {:?}", child("abort").status().unwrap().signal());
    let mut sleeper = child("sleep").spawn().unwrap();
    sleeper.kill().unwrap();
    println!("killed: {:?}", sleeper.wait().unwrap().signal());
    println!("nothing: {:?}", Command::new("/none").spawn().unwrap_err().kind());
    println!("elsewhere: {:?}", child("speak").current_dir("/none").output().unwrap_err().kind());
}

fn files() {
    let dir = Path::new("/tmp/parity-std");
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir.join("a/b/c")).unwrap();
    let path = dir.join("file");
    let mut file = fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    file.seek(SeekFrom::Start(99_990)).unwrap();
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).unwrap();
    println!("file: {} {}", rest.len(), file.metadata().unwrap().len());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    fs::hard_link(&path, dir.join("hard")).unwrap();
    let meta = fs::metadata(&path).unwrap();
    println!("meta: {:o} {}", meta.mode(), meta.nlink());
    println!("recent: {}", meta.modified().unwrap() <= SystemTime::now() + Duration::from_secs(2));
    std::os::unix::fs::symlink("file", dir.join("soft")).unwrap();
    println!("canonical: {:?}", fs::canonicalize(dir.join("a/../soft")).unwrap());
    println!("copied: {}", fs::copy(&path, dir.join("copy")).unwrap());
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    println!("names: {names:?}");
    println!("again: {:?}", fs::create_dir(dir.join("a")).unwrap_err().kind());
    println!("full: {:?}", fs::remove_dir(dir.join("a")).unwrap_err().kind());
    fs::rename(dir.join("a/b"), dir.join("moved")).unwrap();
    println!("moved: {}", dir.join("moved/c").is_dir());
    file.set_len(5).unwrap();
    println!("cut: {:?}", fs::read(dir.join("hard")).unwrap());
    fs::remove_dir_all(dir).unwrap();
    println!("gone: {}", !dir.exists());
}

fn sockets() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let to = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            for _ in 0..20 {
                let (mut stream, _) = listener.accept().unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                stream.write_all(text.to_uppercase().as_bytes()).unwrap();
            }
        });
        let clients: Vec<_> = (0..20)
            .map(|i| {
                thread::spawn(move || {
                    let mut stream = TcpStream::connect(to).unwrap();
                    write!(stream, "client {i}").unwrap();
                    stream.shutdown(std::net::Shutdown::Write).unwrap();
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer).unwrap();
                    answer
                })
            })
            .collect();
        let answers: Vec<String> = clients.into_iter().map(|c| c.join().unwrap()).collect();
        server.join().unwrap();
        println!("answers: {} {}", answers.len(), answers[19]);
        println!("refused: {:?}", TcpStream::connect(to).unwrap_err().kind());
    }
    let (one, two) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    one.send_to(b"datagram", two.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 16];
    let (count, from) = two.recv_from(&mut buffer).unwrap();
    println!("datagram: {count} {}", from == one.local_addr().unwrap());
    two.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    println!("nothing: {:?}", two.recv(&mut buffer).unwrap_err().kind());
    let (mut a, mut b) = UnixStream::pair().unwrap();
    a.write_all(b"pair").unwrap();
    drop(a);
    let mut text = String::new();
    b.read_to_string(&mut text).unwrap();
    println!("unix: {text}");
}

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("speak") => {
            println!("out {:?}", std::env::var("GIVEN"));
            eprintln!("err");
            std::process::exit(17);
        }
        Some("echo") => {
            std::io::copy(&mut std::io::stdin(), &mut std::io::stdout()).unwrap();
        }
        Some("panic") => panic!("on purpose"),
        Some("abort") => std::process::abort(),
        Some("sleep") => thread::sleep(Duration::from_secs(1000)),
        _ => {
            std::panic::set_hook(Box::new(|_| {}));
            threads();
            processes();
            files();
            sockets();
        }
    }
}
