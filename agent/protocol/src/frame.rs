//! ttrpc frames: a 10-byte header and a payload.
//!
//! The decoder is a state machine that is fed bytes as they come. It holds at most one payload,
//! grows its buffer with the bytes that have really arrived (a header that announces 4 MiB costs
//! nothing), and skips payloads above the limit without storing them.

use alloc::vec::Vec;

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 10;
/// Largest payload in bytes (ttrpc's own limit, 4 MiB).
pub const MAX_MESSAGE: usize = 4 << 20;

/// Frame type of a request.
pub const TYPE_REQUEST: u8 = 1;
/// Frame type of a response.
pub const TYPE_RESPONSE: u8 = 2;
/// Frame type of data on a streaming call (not used by us).
pub const TYPE_DATA: u8 = 3;

/// The sender will send no more on this stream.
pub const FLAG_REMOTE_CLOSED: u8 = 1;
/// The sender will send more on this stream: a streaming call.
pub const FLAG_REMOTE_OPEN: u8 = 2;
/// The frame has no payload.
pub const FLAG_NO_DATA: u8 = 4;

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Payload length in bytes.
    pub length: u32,
    /// Which call the frame belongs to; odd for calls made by a client.
    pub stream_id: u32,
    /// [`TYPE_REQUEST`], [`TYPE_RESPONSE`] or [`TYPE_DATA`].
    pub kind: u8,
    /// `FLAG_*` bits.
    pub flags: u8,
}

impl Header {
    /// The header as it goes over the wire.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let l = self.length.to_be_bytes();
        let s = self.stream_id.to_be_bytes();
        [
            l[0], l[1], l[2], l[3], s[0], s[1], s[2], s[3], self.kind, self.flags,
        ]
    }

    /// Reads a header from the wire.
    #[must_use]
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = bytes;
        Self {
            length: u32::from_be_bytes([l0, l1, l2, l3]),
            stream_id: u32::from_be_bytes([s0, s1, s2, s3]),
            kind,
            flags,
        }
    }
}

/// A message that cannot be framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("message of {length} bytes is over ttrpc's limit of {MAX_MESSAGE}; split it or send less")]
pub struct TooLong {
    /// Bytes of the message.
    pub length: usize,
}

/// Encodes `message` as one frame.
pub fn encode<M: prost::Message>(
    stream_id: u32,
    kind: u8,
    message: &M,
) -> Result<Vec<u8>, TooLong> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(TooLong { length });
    }
    let header = Header {
        length: u32::try_from(length).map_err(|_| TooLong { length })?,
        stream_id,
        kind,
        flags: 0,
    };
    let mut out = Vec::with_capacity(HEADER_LEN + length);
    out.extend_from_slice(&header.encode());
    // Cannot fail: a Vec grows.
    message.encode_raw(&mut out);
    Ok(out)
}

/// What a [`Decoder`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A whole frame.
    Message {
        /// Its header.
        header: Header,
        /// Its payload, `header.length` bytes.
        payload: Vec<u8>,
    },
    /// A frame over the decoder's limit. Reported at its header; its payload is skipped.
    Oversized {
        /// Its header.
        header: Header,
    },
    /// No memory for the payload. Reported once; the rest of the payload is skipped.
    NoMemory {
        /// Its header.
        header: Header,
    },
}

#[derive(Debug)]
enum State {
    Header {
        bytes: [u8; HEADER_LEN],
        have: usize,
    },
    Payload {
        header: Header,
        payload: Vec<u8>,
    },
    Skip {
        left: usize,
    },
}

impl State {
    const START: State = State::Header {
        bytes: [0; HEADER_LEN],
        have: 0,
    };
}

/// Turns a byte stream into frames.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    state: State,
}

impl Decoder {
    /// A decoder that takes payloads of up to `limit` bytes (at most [`MAX_MESSAGE`]).
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit: limit.min(MAX_MESSAGE),
            state: State::START,
        }
    }

    /// True between two frames: the stream may end here.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Header { have: 0, .. })
    }

    /// Takes bytes from the front of `input` and returns a frame once there is one.
    ///
    /// Returns `None` when `input` is used up; call it again with what is left until then.
    pub fn feed(&mut self, input: &mut &[u8]) -> Option<Frame> {
        loop {
            match &mut self.state {
                State::Header { bytes, have } => {
                    let (taken, rest) = input.split_at(input.len().min(HEADER_LEN - *have));
                    for (slot, byte) in bytes.iter_mut().skip(*have).zip(taken) {
                        *slot = *byte;
                    }
                    *have += taken.len();
                    *input = rest;
                    if *have < HEADER_LEN {
                        return None;
                    }
                    let header = Header::decode(*bytes);
                    let length = header.length as usize;
                    if length > self.limit {
                        self.state = State::Skip { left: length };
                        return Some(Frame::Oversized { header });
                    }
                    if length == 0 {
                        self.state = State::START;
                        return Some(Frame::Message {
                            header,
                            payload: Vec::new(),
                        });
                    }
                    self.state = State::Payload {
                        header,
                        payload: Vec::new(),
                    };
                }
                State::Payload { header, payload } => {
                    let header = *header;
                    let missing = (header.length as usize).saturating_sub(payload.len());
                    let (taken, rest) = input.split_at(input.len().min(missing));
                    if taken.is_empty() && missing > 0 {
                        return None;
                    }
                    // Grow by doubling, but never past the announced length: a liar gets no more
                    // memory than a few times what it sends.
                    let want = if payload.capacity() - payload.len() < taken.len() {
                        payload.len().max(taken.len()).min(missing)
                    } else {
                        0
                    };
                    if payload.try_reserve_exact(want).is_err() {
                        self.state = State::Skip { left: missing };
                        return Some(Frame::NoMemory { header });
                    }
                    payload.extend_from_slice(taken);
                    *input = rest;
                    if missing == taken.len() {
                        let payload = core::mem::take(payload);
                        self.state = State::START;
                        return Some(Frame::Message { header, payload });
                    }
                    return None;
                }
                State::Skip { left } => {
                    let (taken, rest) = input.split_at(input.len().min(*left));
                    *left -= taken.len();
                    *input = rest;
                    if *left > 0 {
                        return None;
                    }
                    self.state = State::START;
                    if input.is_empty() {
                        return None;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(stream_id: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Header {
            length: u32::try_from(payload.len()).unwrap(),
            stream_id,
            kind,
            flags: 0,
        }
        .encode()
        .to_vec();
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn header_layout_is_big_endian() {
        let header = Header {
            length: 0x0102_0304,
            stream_id: 0x0506_0708,
            kind: 9,
            flags: 10,
        };
        assert_eq!(header.encode(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(Header::decode(header.encode()), header);
    }

    #[test]
    fn oversized_frame_is_skipped_and_the_next_is_read() {
        let mut wire = frame(1, TYPE_REQUEST, &[7; 100]);
        wire.extend(frame(3, TYPE_REQUEST, b"next"));
        for chunk in [1, 3, 7, 200] {
            let mut decoder = Decoder::new(64);
            let mut seen = Vec::new();
            for mut piece in wire.chunks(chunk) {
                while let Some(f) = decoder.feed(&mut piece) {
                    seen.push(f);
                }
            }
            assert_eq!(seen.len(), 2);
            assert!(matches!(seen[0], Frame::Oversized { header } if header.stream_id == 1));
            assert!(matches!(&seen[1], Frame::Message { payload, .. } if payload == b"next"));
            assert!(decoder.is_idle());
        }
    }

    #[test]
    fn announced_length_alone_costs_no_memory() {
        let mut decoder = Decoder::new(MAX_MESSAGE);
        let header = Header {
            length: MAX_MESSAGE as u32,
            stream_id: 1,
            kind: 1,
            flags: 0,
        };
        let mut wire = header.encode().to_vec();
        wire.extend_from_slice(&[1; 100]);
        assert_eq!(decoder.feed(&mut wire.as_slice()), None);
        let State::Payload { payload, .. } = &decoder.state else {
            panic!("not in the payload")
        };
        assert!(payload.capacity() < 1024, "{}", payload.capacity());
    }

    #[test]
    fn message_over_the_limit_is_refused() {
        let message = crate::types::Any {
            type_url: String::new(),
            value: vec![0; MAX_MESSAGE],
        };
        assert!(encode(1, TYPE_REQUEST, &message).is_err());
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_frames(
            messages in prop::collection::vec((any::<u32>(), any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            cuts in prop::collection::vec(1usize..64, 1..64),
        ) {
            let mut wire = Vec::new();
            for (id, kind, payload) in &messages {
                wire.extend(frame(*id, *kind, payload));
            }
            let mut decoder = Decoder::new(200);
            let mut seen = Vec::new();
            let mut rest = wire.as_slice();
            let mut cuts = cuts.iter().cycle();
            while !rest.is_empty() {
                let (mut piece, tail) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                rest = tail;
                while let Some(f) = decoder.feed(&mut piece) {
                    seen.push(f);
                }
                prop_assert!(piece.is_empty());
            }
            prop_assert!(decoder.is_idle());
            prop_assert_eq!(seen.len(), messages.len());
            for (f, (id, kind, payload)) in seen.iter().zip(&messages) {
                match f {
                    Frame::Message { header, payload: got } => {
                        prop_assert!(payload.len() <= 200);
                        prop_assert_eq!(got, payload);
                        prop_assert_eq!((header.stream_id, header.kind), (*id, *kind));
                    }
                    Frame::Oversized { header } => {
                        prop_assert!(payload.len() > 200);
                        prop_assert_eq!(header.stream_id, *id);
                    }
                    Frame::NoMemory { .. } => prop_assert!(false),
                }
            }
        }

        #[test]
        fn garbage_never_holds_more_than_the_limit(bytes in prop::collection::vec(any::<u8>(), 0..4000), limit in 0usize..2000) {
            let mut decoder = Decoder::new(limit);
            let mut input = bytes.as_slice();
            while let Some(f) = decoder.feed(&mut input) {
                if let Frame::Message { payload, header } = f {
                    prop_assert!(payload.len() <= limit && payload.capacity() <= limit.max(8));
                    prop_assert_eq!(payload.len(), header.length as usize);
                }
            }
            if let State::Payload { payload, .. } = &decoder.state {
                prop_assert!(payload.capacity() <= limit.max(8));
            }
        }
    }
}
