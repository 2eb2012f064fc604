//! A small blocking WebSocket client for CRI's exec, attach and port-forward URLs
//! (RFC 6455; Kubernetes' subprotocols put a channel number before each message's bytes).

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail};

/// Largest message taken.
const MAX_MESSAGE: u64 = 16 << 20;

/// A connection.
#[derive(Debug)]
pub struct WebSocket {
    stream: TcpStream,
}

impl WebSocket {
    /// Connects to `url` (`http://host:port/path`), speaking `protocol`.
    ///
    /// # Errors
    /// The server refuses.
    pub fn connect(url: &str, protocol: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").context("not an http URL")?;
        let (host, path) = rest.split_once('/').context("no path")?;
        let mut stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(crate::env::PATIENCE))?;
        // The key proves nothing: any 16 bytes in base64 do.
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
            if head.len() > 16 << 10 {
                bail!("the answer's head is too long");
            }
        }
        let head = String::from_utf8_lossy(&head);
        if !head.starts_with("HTTP/1.1 101") {
            bail!("no upgrade: {head}");
        }
        Ok(Self { stream })
    }

    /// Sends a binary message.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn send(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        let length = data.len() + 1;
        let mut frame = vec![0x82];
        match length {
            0..126 => frame.push(0x80 | u8::try_from(length)?),
            126..65_536 => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&u16::try_from(length)?.to_be_bytes());
            }
            _ => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&u64::try_from(length)?.to_be_bytes());
            }
        }
        // A mask of zeros changes nothing.
        frame.extend_from_slice(&[0; 4]);
        frame.push(channel);
        frame.extend_from_slice(data);
        Ok(self.stream.write_all(&frame)?)
    }

    /// The next message: channel and bytes. `None` when the server has closed.
    ///
    /// # Errors
    /// The connection broke, or nothing comes for long.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            if self.stream.read_exact(&mut head).is_err() {
                return Ok(None);
            }
            let length = match head[1] & 0x7f {
                126 => {
                    let mut bytes = [0; 2];
                    self.stream.read_exact(&mut bytes)?;
                    u64::from(u16::from_be_bytes(bytes))
                }
                127 => {
                    let mut bytes = [0; 8];
                    self.stream.read_exact(&mut bytes)?;
                    u64::from_be_bytes(bytes)
                }
                short => short.into(),
            };
            if length > MAX_MESSAGE {
                bail!("a message of {length} bytes");
            }
            let mut data = vec![0; usize::try_from(length)?];
            self.stream.read_exact(&mut data)?;
            match head[0] & 0x0f {
                8 => return Ok(None),
                // Ping and pong.
                9 | 10 => {}
                _ if data.is_empty() => {}
                _ => {
                    let channel = data.remove(0);
                    return Ok(Some((channel, data)));
                }
            }
        }
    }

    /// Everything until the server closes: standard output, standard error, and what it says about
    /// the end.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn finish(&mut self) -> Result<(Vec<u8>, Vec<u8>, String)> {
        let (mut out, mut err, mut end) = (Vec::new(), Vec::new(), Vec::new());
        while let Some((channel, data)) = self.receive()? {
            match channel {
                1 => out.extend(data),
                2 => err.extend(data),
                3 => end.extend(data),
                _ => {}
            }
        }
        Ok((out, err, String::from_utf8_lossy(&end).into_owned()))
    }
}
