//! The header of a stdio stream: one line each way, then raw bytes.

use alloc::string::String;
use alloc::vec::Vec;

/// Longest stream id in bytes.
pub const MAX_ID: usize = 128;
/// Longest header line in bytes, with its newline.
pub const MAX_HEADER: usize = MAX_ID + 1;
/// Longest answer line in bytes, with its newline.
pub const MAX_ANSWER: usize = 256;
/// Scheme of a stream in the `stdin`, `stdout` and `stderr` fields of Task requests.
pub const SCHEME: &str = "stream:";
/// Start of an id that stands for a connection to a TCP port of the guest's loopback: `tcp:8080`.
pub const TCP: &str = "tcp:";
/// The guest's answer when it has taken the stream.
pub const OK: &[u8] = b"ok\n";

/// Why a stream header or answer is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Empty, too long, or with a byte that is not printable ASCII.
    #[error("stream id must be 1 to {MAX_ID} printable ASCII bytes without spaces")]
    BadId,
    /// No newline within the limit.
    #[error("stream header or answer is longer than its limit")]
    TooLong,
    /// The guest refused the stream.
    #[error("guest refused the stream: {0}")]
    Refused(String),
    /// Neither `ok` nor `error`.
    #[error("guest's answer to a stream header is neither ok nor error")]
    BadAnswer,
}

/// Checks a stream id.
pub fn check_id(id: &str) -> Result<(), StreamError> {
    if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(StreamError::BadId);
    }
    Ok(())
}

/// The line the host writes first.
pub fn connect_header(id: &str) -> Result<Vec<u8>, StreamError> {
    check_id(id)?;
    let mut line = Vec::with_capacity(id.len() + 1);
    line.extend_from_slice(id.as_bytes());
    line.push(b'\n');
    Ok(line)
}

/// Looks for a header in the bytes read so far: the id and how many bytes it took, or `None`
/// when more are needed. Bytes behind it belong to the stream.
pub fn parse_header(bytes: &[u8]) -> Result<Option<(String, usize)>, StreamError> {
    let Some((line, used)) = line(bytes, MAX_HEADER)? else {
        return Ok(None);
    };
    let id = core::str::from_utf8(line).map_err(|_| StreamError::BadId)?;
    check_id(id)?;
    Ok(Some((String::from(id), used)))
}

/// The guest's refusal. `reason` is cut and made printable.
#[must_use]
pub fn error_answer(reason: &str) -> Vec<u8> {
    let mut line = b"error ".to_vec();
    line.extend(
        reason
            .bytes()
            .map(|b| if (b' '..=b'~').contains(&b) { b } else { b'?' })
            .take(MAX_ANSWER - 7),
    );
    line.push(b'\n');
    line
}

/// Looks for the guest's answer in the bytes read so far: how many bytes it took, or `None` when
/// more are needed. Bytes behind it belong to the stream.
pub fn parse_answer(bytes: &[u8]) -> Result<Option<usize>, StreamError> {
    let Some((line, used)) = line(bytes, MAX_ANSWER)? else {
        return Ok(None);
    };
    if line == b"ok" {
        return Ok(Some(used));
    }
    match line.strip_prefix(b"error ") {
        // The guest chose these bytes and people read them: printable ASCII only.
        Some(reason) => Err(StreamError::Refused(
            reason
                .iter()
                .map(|b| {
                    if (b' '..=b'~').contains(b) {
                        char::from(*b)
                    } else {
                        '?'
                    }
                })
                .collect(),
        )),
        None => Err(StreamError::BadAnswer),
    }
}

fn line(bytes: &[u8], limit: usize) -> Result<Option<(&[u8], usize)>, StreamError> {
    match bytes.iter().take(limit).position(|b| *b == b'\n') {
        Some(end) => Ok(Some((bytes.get(..end).unwrap_or_default(), end + 1))),
        None if bytes.len() >= limit => Err(StreamError::TooLong),
        None => Ok(None),
    }
}

/// The value of a `stdin`, `stdout` or `stderr` field that names stream `id`.
#[must_use]
pub fn uri(id: &str) -> String {
    let mut uri = String::from(SCHEME);
    uri.push_str(id);
    uri
}

/// Makes the stream on a connection to [`crate::STREAM_PORT`]: writes the header and waits for
/// the answer. Reads no further than the answer.
#[cfg(feature = "tokio")]
pub async fn connect<S>(connection: &mut S, id: &str) -> std::io::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let other =
        |error: StreamError| std::io::Error::other(alloc::format!("stream {id:?}: {error}"));
    connection
        .write_all(&connect_header(id).map_err(other)?)
        .await?;
    connection.flush().await?;
    let mut answer = Vec::new();
    loop {
        answer.push(connection.read_u8().await?);
        if parse_answer(&answer).map_err(other)?.is_some() {
            return Ok(());
        }
    }
}

/// [`connect`] for blocking sockets.
#[cfg(feature = "tokio")]
pub fn connect_blocking<S: std::io::Read + std::io::Write>(
    connection: &mut S,
    id: &str,
) -> std::io::Result<()> {
    let other =
        |error: StreamError| std::io::Error::other(alloc::format!("stream {id:?}: {error}"));
    connection.write_all(&connect_header(id).map_err(other)?)?;
    connection.flush()?;
    let mut answer = Vec::new();
    loop {
        let mut byte = [0];
        connection.read_exact(&mut byte)?;
        answer.push(byte[0]);
        if parse_answer(&answer).map_err(other)?.is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_and_answer_go_both_ways() {
        let mut wire = connect_header("c1-stdin").unwrap();
        wire.extend_from_slice(b"payload");
        assert_eq!(
            parse_header(&wire).unwrap(),
            Some((String::from("c1-stdin"), 9))
        );
        assert_eq!(parse_header(b"c1").unwrap(), None);
        assert_eq!(parse_answer(b"ok\nrest").unwrap(), Some(3));
        assert_eq!(parse_answer(b"o").unwrap(), None);
        assert_eq!(
            parse_answer(&error_answer("no\nsuch\u{1b}")),
            Err(StreamError::Refused(String::from("no?such?")))
        );
        assert_eq!(parse_answer(b"what\n"), Err(StreamError::BadAnswer));
    }

    #[test]
    fn bad_ids_are_refused() {
        for id in ["", "a b", "a\n", "\u{e4}", &"x".repeat(129)] {
            assert_eq!(connect_header(id), Err(StreamError::BadId), "{id:?}");
        }
        assert_eq!(parse_header(&[b'x'; 129]), Err(StreamError::TooLong));
        assert_eq!(parse_header(b"\n"), Err(StreamError::BadId));
    }

    proptest! {
        #[test]
        fn parsers_take_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(Some((id, used))) = parse_header(&bytes) {
                prop_assert!(used <= MAX_HEADER && check_id(&id).is_ok());
            }
            let _ = parse_answer(&bytes);
        }

        #[test]
        fn refusals_always_parse(reason in ".{0,400}") {
            let line = error_answer(&reason);
            prop_assert!(line.len() <= MAX_ANSWER);
            prop_assert!(matches!(parse_answer(&line), Err(StreamError::Refused(_))));
        }
    }
}
