//! containerd's streaming I/O: standard streams that containerd opens on the pod's ttrpc socket,
//! before the process exists, and opens again after its own restart.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::frame::{self, TYPE_DATA};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::types::Any;
use prost::Message;
use tokio::sync::mpsc;

use super::proto::{DATA, Data, WINDOW_UPDATE, WindowUpdate};
use super::ttrpc;

/// Streams that may wait for a process to name them, per pod.
const MAX_WAITING: usize = 1024;
/// Most bytes in one message; containerd's own choice.
pub const CHUNK: usize = 32 << 10;
/// What a sender may have under way; containerd's own choice.
const WINDOW: i32 = 64 << 10;
/// How long a peer may take to read what it was sent before its process is said to have ended.
const TAKE_TIME: Duration = Duration::from_secs(10);
/// See [`Peer::finish_when_taken`].
const SETTLE: Duration = Duration::from_millis(100);

/// What comes from the other end of a stream.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(Any),
    /// It will send no more.
    Closed,
}

/// containerd's end of a stream, as long as one connection lasts.
#[derive(Debug)]
pub struct Peer {
    stream_id: u32,
    messages: mpsc::Receiver<Incoming>,
    frames: mpsc::Sender<Vec<u8>>,
    credit: usize,
    granted: i32,
    sent: bool,
}

/// What became of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its connection broke: it may come back.
    Lost,
    /// It said that it has finished.
    Closed,
}

impl Peer {
    /// A peer on a connection.
    pub fn new(
        stream_id: u32,
        messages: mpsc::Receiver<Incoming>,
        frames: mpsc::Sender<Vec<u8>>,
    ) -> Self {
        Self {
            stream_id,
            messages,
            frames,
            credit: 0,
            granted: 0,
            sent: false,
        }
    }

    async fn next(&mut self) -> Result<Any, End> {
        match self.messages.recv().await {
            Some(Incoming::Message(any)) => Ok(any),
            Some(Incoming::Closed) => Err(End::Closed),
            None => Err(End::Lost),
        }
    }

    async fn send(&self, any: &Any) -> Result<(), End> {
        let frame = frame::encode(self.stream_id, TYPE_DATA, any).map_err(|_| End::Closed)?;
        self.frames.send(frame).await.map_err(|_| End::Lost)
    }

    /// Waits until it can take bytes; how many, at most [`CHUNK`].
    ///
    /// # Errors
    /// It has gone.
    pub async fn room(&mut self) -> Result<usize, End> {
        loop {
            // Look at all that has come: the end too, while there is room.
            match self.messages.try_recv() {
                Ok(Incoming::Message(any)) => self.update(&any),
                Ok(Incoming::Closed) => return Err(End::Closed),
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(End::Lost),
                Err(mpsc::error::TryRecvError::Empty) if self.credit > 0 => {
                    return Ok(self.credit.min(CHUNK));
                }
                Err(mpsc::error::TryRecvError::Empty) => {
                    let any = self.next().await?;
                    self.update(&any);
                }
            }
        }
    }

    fn update(&mut self, any: &Any) {
        if any.type_url.ends_with(WINDOW_UPDATE)
            && let Ok(update) = WindowUpdate::decode(any.value.as_slice())
        {
            let more = usize::try_from(update.update).unwrap_or(0);
            self.credit = self.credit.saturating_add(more);
        }
    }

    /// Waits until it has taken what it was sent, as far as one can tell, and tells it that no more
    /// will come.
    ///
    /// containerd cancels its end as soon as it learns of the process's end, and loses what it has
    /// received and not yet written to the log. A protocol without acknowledgements tells only that
    /// it is within its last window: it grants a new one when less than one is left. What may be
    /// under way then is two messages between two of its threads, which [`SETTLE`] is for.
    pub async fn finish_when_taken(mut self) {
        if !self.sent {
            return self.finish().await;
        }
        let taken = async {
            while self.credit < WINDOW as usize {
                match self.next().await {
                    Ok(any) => self.update(&any),
                    Err(_) => return,
                }
            }
        };
        let _ = tokio::time::timeout(TAKE_TIME, taken).await;
        self.finish().await;
        tokio::time::sleep(SETTLE).await;
    }

    /// Waits until it goes away, noting what it can take meanwhile.
    pub async fn gone(&mut self) -> End {
        loop {
            match self.next().await {
                Ok(any) => self.update(&any),
                Err(end) => return end,
            }
        }
    }

    /// Sends bytes for which there is [`room`](Self::room).
    ///
    /// # Errors
    /// It has gone.
    pub async fn data(&mut self, bytes: &[u8]) -> Result<(), End> {
        let data = Data {
            data: bytes.to_vec(),
        };
        self.send(&Any::of(DATA, &data)).await?;
        self.sent = true;
        self.credit = self.credit.saturating_sub(bytes.len());
        Ok(())
    }

    /// Waits for bytes. `None` at the end of its data.
    ///
    /// # Errors
    /// It has gone without an end.
    pub async fn receive(&mut self) -> Result<Option<Vec<u8>>, End> {
        loop {
            if self.granted < WINDOW / 2 {
                let update = WINDOW - self.granted;
                self.granted = WINDOW;
                self.send(&Any::of(WINDOW_UPDATE, &WindowUpdate { update }))
                    .await?;
            }
            match self.next().await {
                Ok(any) if any.type_url.ends_with(DATA) => {
                    let Ok(data) = Data::decode(any.value.as_slice()) else {
                        continue;
                    };
                    let taken = i32::try_from(data.data.len()).unwrap_or(i32::MAX);
                    self.granted = self.granted.saturating_sub(taken);
                    if !data.data.is_empty() {
                        return Ok(Some(data.data));
                    }
                }
                // What is not data means nothing here.
                Ok(_) => {}
                Err(End::Closed) => return Ok(None),
                Err(End::Lost) => return Err(End::Lost),
            }
        }
    }

    /// Tells it that no more will come.
    pub async fn finish(self) {
        let _ = self.frames.send(ttrpc::closed(self.stream_id)).await;
    }
}

#[derive(Debug)]
enum Slot {
    /// containerd has opened it, no process has named it yet.
    Waiting(Peer),
    /// A process has it; a peer that comes (again) is passed on.
    Claimed(mpsc::Sender<Peer>),
}

/// The streams of a pod by id.
#[derive(Debug, Default)]
pub struct Streams(Mutex<HashMap<String, Slot>>);

impl Streams {
    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a stream that containerd has opened.
    ///
    /// # Errors
    /// Too many wait.
    pub fn offer(&self, id: &str, peer: Peer) -> Result<(), Status> {
        let mut slots = self.slots();
        if let Some(Slot::Claimed(sender)) = slots.get(id) {
            return sender.try_send(peer).map_err(|_| {
                Status::new(
                    Code::ResourceExhausted,
                    "the stream has a reader already, and more wait",
                )
            });
        }
        // Those whose connection has gone make room.
        slots.retain(|_, slot| match slot {
            Slot::Waiting(peer) => !peer.frames.is_closed(),
            Slot::Claimed(_) => true,
        });
        if slots.len() >= MAX_WAITING {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("{MAX_WAITING} streams of this pod wait for a process"),
            ));
        }
        slots.insert(id.to_owned(), Slot::Waiting(peer));
        Ok(())
    }

    /// Gives the stream to a process: the peers it has, one after the other.
    ///
    /// # Errors
    /// Another process has it.
    pub fn claim(self: &std::sync::Arc<Self>, id: &str) -> Result<Claim, Status> {
        let (sender, peers) = mpsc::channel(2);
        let mut slots = self.slots();
        match slots.remove(id) {
            Some(Slot::Claimed(other)) => {
                slots.insert(id.to_owned(), Slot::Claimed(other));
                return Err(Status::new(
                    Code::AlreadyExists,
                    "the stream is in use by another process",
                ));
            }
            Some(Slot::Waiting(peer)) => {
                // The channel is new and has room.
                let _ = sender.try_send(peer);
            }
            None => {}
        }
        slots.insert(id.to_owned(), Slot::Claimed(sender));
        drop(slots);
        Ok(Claim {
            streams: std::sync::Arc::clone(self),
            id: id.to_owned(),
            peers,
        })
    }
}

/// A process's right to a stream.
#[derive(Debug)]
pub struct Claim {
    streams: std::sync::Arc<Streams>,
    id: String,
    peers: mpsc::Receiver<Peer>,
}

impl Claim {
    /// The next peer, when there is one.
    pub async fn peer(&mut self) -> Option<Peer> {
        self.peers.recv().await
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.streams.slots().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn peer() -> (Peer, mpsc::Sender<Incoming>, mpsc::Receiver<Vec<u8>>) {
        let (messages, incoming) = mpsc::channel(4);
        let (frames, sent) = mpsc::channel(4);
        (Peer::new(1, incoming, frames), messages, sent)
    }

    fn update(n: i32) -> Incoming {
        Incoming::Message(Any::of(WINDOW_UPDATE, &WindowUpdate { update: n }))
    }

    #[tokio::test]
    async fn nothing_is_sent_without_room() {
        let (mut peer, messages, mut sent) = peer();
        messages.send(update(5)).await.expect("send");
        assert_eq!(peer.room().await, Ok(5));
        peer.data(b"hello").await.expect("data");
        assert!(sent.recv().await.is_some());
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(20), peer.room())
                .await
                .is_err()
        );
        messages.send(Incoming::Closed).await.expect("send");
        assert_eq!(peer.room().await, Err(End::Closed));
    }

    #[tokio::test]
    async fn the_end_waits_until_all_is_taken() {
        let (mut peer, messages, mut sent) = peer();
        messages.send(update(WINDOW)).await.expect("send");
        assert!(peer.room().await.is_ok());
        peer.data(b"the end").await.expect("data");
        let finished = tokio::spawn(peer.finish_when_taken());
        assert!(sent.recv().await.is_some(), "data");
        assert!(sent.try_recv().is_err(), "closed before it was taken");
        messages.send(update(WINDOW)).await.expect("send");
        assert!(sent.recv().await.is_some(), "closed");
        finished.await.expect("finish");
    }

    #[tokio::test]
    async fn a_stream_survives_its_connection() {
        let streams = Arc::new(Streams::default());
        let (first, messages, _sent) = peer();
        streams.offer("c-stdout", first).expect("offer");
        let mut claim = streams.claim("c-stdout").expect("claim");
        assert!(streams.claim("c-stdout").is_err());
        let mut got = claim.peer().await.expect("first");
        drop(messages);
        assert_eq!(got.room().await, Err(End::Lost));
        let (second, messages, _sent) = peer();
        streams.offer("c-stdout", second).expect("offer");
        let mut got = claim.peer().await.expect("second");
        messages.send(update(1)).await.expect("send");
        assert_eq!(got.room().await, Ok(1));
        drop(claim);
        assert!(streams.claim("c-stdout").is_ok());
    }

    #[tokio::test]
    async fn input_is_paid_for_before_it_comes() {
        let (mut peer, messages, mut sent) = peer();
        let data = Data { data: vec![7; 10] };
        messages
            .send(Incoming::Message(Any::of(DATA, &data)))
            .await
            .expect("send");
        messages.send(Incoming::Closed).await.expect("send");
        assert_eq!(peer.receive().await, Ok(Some(vec![7; 10])));
        assert!(sent.recv().await.is_some(), "a window was given");
        assert_eq!(peer.receive().await, Ok(None));
    }
}
