//! ttrpc's own messages: what the frames carry.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use crate::frame::{self, TooLong};
use crate::types::Any;

/// A call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// Full name of the service, for example `containerd.task.v3.Task`.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Name of the method, for example `Create`.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The encoded argument.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// How long the caller will wait, in ns; 0 for ever.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
    /// Further information about the call.
    #[prost(message, repeated, tag = "5")]
    pub metadata: Vec<KeyValue>,
}

/// One entry of a request's metadata.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct KeyValue {
    /// Name.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// An answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// How it went; absent means OK.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The encoded result.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// The gRPC codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Code {
    /// No error.
    Ok = 0,
    /// Cancelled, usually by the caller.
    Cancelled = 1,
    /// No better code.
    Unknown = 2,
    /// Wrong whatever the state of the system.
    InvalidArgument = 3,
    /// Too late.
    DeadlineExceeded = 4,
    /// No such thing.
    NotFound = 5,
    /// It is there already.
    AlreadyExists = 6,
    /// Not allowed.
    PermissionDenied = 7,
    /// A limit was hit.
    ResourceExhausted = 8,
    /// Not in this state.
    FailedPrecondition = 9,
    /// Try again from further up.
    Aborted = 10,
    /// Past the end.
    OutOfRange = 11,
    /// No such method, or not supported.
    Unimplemented = 12,
    /// A fault of ours.
    Internal = 13,
    /// Try again.
    Unavailable = 14,
    /// Data is lost.
    DataLoss = 15,
    /// Who are you?
    Unauthenticated = 16,
}

/// How a call went.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// A [`Code`].
    #[prost(enumeration = "Code", tag = "1")]
    pub code: i32,
    /// For people: the object, the cause, the remedy.
    #[prost(string, tag = "2")]
    pub message: String,
    /// For programs.
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<Any>,
}

impl Status {
    /// A status of this code with this message.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code: code as i32,
            message: message.into(),
            details: Vec::new(),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Code::try_from(self.code) {
            Ok(code) => write!(f, "{} ({code:?})", self.message),
            Err(_) => write!(f, "{} (code {})", self.message, self.code),
        }
    }
}

impl core::error::Error for Status {}

impl Response {
    /// The answer to a call that gave `result`.
    #[must_use]
    pub fn new(result: Result<Vec<u8>, Status>) -> Self {
        match result {
            Ok(payload) => Self {
                // Go's ttrpc takes an absent status as OK, older Rust ones want to see it.
                status: Some(Status::new(Code::Ok, "")),
                payload,
            },
            Err(status) => Self {
                status: Some(status),
                payload: Vec::new(),
            },
        }
    }

    /// The payload, or the error it reports.
    pub fn into_result(self) -> Result<Vec<u8>, Status> {
        match self.status {
            Some(status) if status.code != Code::Ok as i32 => Err(status),
            _ => Ok(self.payload),
        }
    }
}

/// Encodes the answer to call `stream_id` as a frame. An answer that is too long becomes a
/// RESOURCE_EXHAUSTED.
#[must_use]
pub fn encode_response(stream_id: u32, result: Result<Vec<u8>, Status>) -> Vec<u8> {
    frame::encode(stream_id, frame::TYPE_RESPONSE, &Response::new(result)).unwrap_or_else(|error| {
        short_response(
            stream_id,
            Status::new(Code::ResourceExhausted, error.to_string()),
        )
    })
}

/// Encodes an error whose size is known to be small.
fn short_response(stream_id: u32, status: Status) -> Vec<u8> {
    frame::encode(stream_id, frame::TYPE_RESPONSE, &Response::new(Err(status))).unwrap_or_default()
}

/// Encodes a call as a frame.
pub fn encode_request(stream_id: u32, request: &Request) -> Result<Vec<u8>, TooLong> {
    frame::encode(stream_id, frame::TYPE_REQUEST, request)
}

/// Looks at a frame that reached a server: a call, or the frame to answer it with (`Err(None)`:
/// nothing to answer, ignore it). For servers without tokio; [`crate::server`] uses it too.
pub fn accept_request(frame: frame::Frame) -> Result<(u32, Request), Option<Vec<u8>>> {
    use frame::Frame;
    let (header, payload) = match frame {
        Frame::Message { header, payload } => (header, payload),
        Frame::Oversized { header } | Frame::NoMemory { header } => {
            if header.kind != frame::TYPE_REQUEST {
                return Err(None);
            }
            return Err(Some(short_response(
                header.stream_id,
                Status::new(
                    Code::ResourceExhausted,
                    alloc::format!(
                        "request of {} bytes is over this server's limit; send less",
                        header.length
                    ),
                ),
            )));
        }
    };
    // Data and responses make no sense here. They belong to calls that were refused or never
    // existed, so dropping them is enough.
    if header.kind != frame::TYPE_REQUEST {
        return Err(None);
    }
    let refuse = |code, message: &str| {
        Err(Some(short_response(
            header.stream_id,
            Status::new(code, message),
        )))
    };
    if header.flags & frame::FLAG_REMOTE_OPEN != 0 {
        return refuse(
            Code::Unimplemented,
            "streaming calls are not supported here; use unary ones",
        );
    }
    match <Request as prost::Message>::decode(payload.as_slice()) {
        Ok(request) => Ok((header.stream_id, request)),
        Err(_) => refuse(
            Code::InvalidArgument,
            "the frame does not hold a ttrpc request",
        ),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn request_decoding_never_panics(kind in 0u8..4, flags in 0u8..8, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let header = frame::Header { length: payload.len() as u32, stream_id: 1, kind, flags };
            let _ = accept_request(frame::Frame::Message { header, payload });
        }
    }

    #[test]
    fn a_response_that_is_too_long_becomes_an_error() {
        let bytes = encode_response(5, Ok(vec![0; frame::MAX_MESSAGE]));
        let mut decoder = frame::Decoder::new(frame::MAX_MESSAGE);
        let Some(frame::Frame::Message { header, payload }) = decoder.feed(&mut bytes.as_slice())
        else {
            panic!("no frame")
        };
        assert_eq!(header.stream_id, 5);
        let response = <Response as prost::Message>::decode(payload.as_slice()).unwrap();
        assert_eq!(
            response.into_result().unwrap_err().code,
            Code::ResourceExhausted as i32
        );
    }
}
