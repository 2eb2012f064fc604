//! A registry on this host's loopback, with one OCI layout in it: as much of the distribution
//! protocol as a pull needs.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// A running registry. It serves until the process ends.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
}

impl Registry {
    /// Serves what is in `layouts`, a directory of OCI layouts: `NAME:latest` is the first manifest
    /// of the layout `NAME`.
    ///
    /// # Errors
    /// No port is free.
    pub fn serve(layouts: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let layouts = layouts.to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let layouts = layouts.clone();
                std::thread::spawn(move || answer(&stream, &layouts));
            }
        });
        Ok(Self { address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The full name of an image.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.address)
    }
}

/// Answers one request and closes.
fn answer(mut stream: &TcpStream, layouts: &Path) -> Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().context("no request")??;
    while lines.next().is_some_and(|l| l.is_ok_and(|l| !l.is_empty())) {}
    let mut words = request.split(' ');
    let (method, path) = (words.next(), words.next().unwrap_or_default());
    let found = find(path, layouts).ok();
    let (code, kind, body) = match &found {
        Some((kind, body)) => ("200 OK", kind.as_str(), body.as_slice()),
        None => ("404 Not Found", "text/plain", &b""[..]),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    )?;
    if method == Some("GET") {
        stream.write_all(body)?;
    }
    Ok(())
}

/// Media type and content.
fn find(path: &str, layouts: &Path) -> Result<(String, Vec<u8>)> {
    let path = path.strip_prefix("/v2/").context("not the protocol")?;
    let parts: Vec<&str> = path.split('/').collect();
    let [name, kind, reference] = parts[..] else {
        // Whether it is a registry at all.
        return Ok(("application/json".into(), b"{}".to_vec()));
    };
    let layout = layouts.join(name);
    let blob = |digest: &str| -> Result<(PathBuf, Vec<u8>)> {
        let file = layout.join("blobs").join(digest.replace(':', "/"));
        let content = fs::read(&file)?;
        Ok((file, content))
    };
    if kind == "blobs" {
        return Ok(("application/octet-stream".into(), blob(reference)?.1));
    }
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let digest = match reference {
        "latest" => index["manifests"][0]["digest"].as_str().context("digest")?,
        digest => digest,
    };
    let (_, content) = blob(digest)?;
    let manifest: Value = serde_json::from_slice(&content)?;
    let kind = manifest["mediaType"].as_str().context("media type")?;
    Ok((kind.to_owned(), content))
}
