//! The ttrpc socket of a pod: containerd's Task service (unary calls) and its Streaming service
//! (one two-way stream of `Any` per standard stream of a process).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::frame::{
    self, Decoder, FLAG_NO_DATA, FLAG_REMOTE_CLOSED, FLAG_REMOTE_OPEN, Frame, Header, MAX_MESSAGE,
    TYPE_DATA, TYPE_REQUEST,
};
use bulkhead_protocol::rpc::{self, Code, Request, Status};
use bulkhead_protocol::server::Dispatch;
use bulkhead_protocol::types::Any;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::proto::{STREAM_INIT, STREAMING, StreamInit};
use super::streaming::{Incoming, Peer, Streams};

/// Unary calls under way on one connection. containerd has one `Wait` per process and connection.
const MAX_CALLS: usize = 4096;
/// Streams on one connection; containerd opens one.
const MAX_STREAMS: usize = 16;
/// Messages of one stream that wait to be looked at; then the connection waits.
const QUEUE: usize = 16;
/// How long a connection whose streams have all ended may stay open for its caller to close it.
const LINGER: Duration = Duration::from_secs(5);

/// One open stream of a connection.
struct Open {
    /// `None` once the caller has said that it will send no more.
    messages: Option<mpsc::Sender<Incoming>>,
    /// The first message, which names the stream, is still to come.
    unnamed: Option<mpsc::Receiver<Incoming>>,
}

/// Serves one connection until it ends.
///
/// # Errors
/// What the socket says.
pub async fn serve(
    stream: UnixStream,
    tasks: Arc<dyn Dispatch>,
    streams: Arc<Streams>,
) -> std::io::Result<()> {
    let (mut reader, writer) = stream.into_split();
    let (frames, queue) = mpsc::channel::<Vec<u8>>(16);
    let writer = tokio::spawn(write_frames(writer, queue));
    let mut connection = Connection {
        calls: JoinSet::new(),
        open: HashMap::new(),
        frames,
        tasks,
        streams,
        streamed: false,
    };
    let mut decoder = Decoder::new(MAX_MESSAGE);
    let mut buffer = vec![0; 16 << 10];
    let result = 'connection: loop {
        // containerd leaves connections of ended streams open for ever: they are ours to close.
        let idle = connection.streamed && connection.open.is_empty();
        let n = tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(0) => break Ok(()),
                Ok(n) => n,
                Err(error) => break Err(error),
            },
            () = tokio::time::sleep(LINGER), if idle => break Ok(()),
            // Nobody can be answered any more.
            () = connection.frames.closed() => break Ok(()),
        };
        let mut input = buffer.get(..n).unwrap_or_default();
        while let Some(frame) = decoder.feed(&mut input) {
            if connection.accept(frame).await.is_err() {
                break 'connection Ok(());
            }
        }
    };
    connection.calls.shutdown().await;
    drop(connection);
    // Streams that nobody has claimed hold on to the queue; what matters is on its way by then.
    let mut writer = writer;
    if tokio::time::timeout(LINGER, &mut writer).await.is_err() {
        writer.abort();
    }
    result
}

async fn write_frames(
    mut writer: tokio::net::unix::OwnedWriteHalf,
    mut queue: mpsc::Receiver<Vec<u8>>,
) {
    while let Some(frame) = queue.recv().await {
        if writer.write_all(&frame).await.is_err() {
            return;
        }
    }
    let _ = writer.shutdown().await;
}

struct Connection {
    calls: JoinSet<()>,
    open: HashMap<u32, Open>,
    frames: mpsc::Sender<Vec<u8>>,
    tasks: Arc<dyn Dispatch>,
    streams: Arc<Streams>,
    /// It carried a stream: then it is containerd's connection for that stream alone.
    streamed: bool,
}

/// The connection has ended.
struct Gone;

impl Connection {
    async fn answer(&self, frame: Vec<u8>) -> Result<(), Gone> {
        self.frames.send(frame).await.map_err(|_| Gone)
    }

    async fn accept(&mut self, frame: Frame) -> Result<(), Gone> {
        while self.calls.try_join_next().is_some() {}
        if let Frame::Message { header, payload } = &frame {
            if header.kind == TYPE_DATA {
                return self.data(*header, payload).await;
            }
            if header.kind == TYPE_REQUEST && header.flags & FLAG_REMOTE_OPEN != 0 {
                return self.open_stream(*header, payload).await;
            }
        }
        match rpc::accept_request(frame) {
            Ok((id, request)) if self.calls.len() < MAX_CALLS => {
                self.call(id, request);
                Ok(())
            }
            Ok((id, _)) => {
                let text = format!("{MAX_CALLS} calls are under way on this connection");
                let status = Status::new(Code::ResourceExhausted, text);
                self.answer(rpc::encode_response(id, Err(status))).await
            }
            Err(Some(answer)) => self.answer(answer).await,
            Err(None) => Ok(()),
        }
    }

    fn call(&mut self, id: u32, request: Request) {
        let frames = self.frames.clone();
        let work = (request.service == self.tasks.service())
            .then(|| self.tasks.dispatch(&request.method, &request.payload));
        self.calls.spawn(async move {
            let result = match work {
                None => Err(Status::new(
                    Code::Unimplemented,
                    format!("no service {:?} here", short(&request.service)),
                )),
                Some(work) => match u64::try_from(request.timeout_nano) {
                    Ok(nanos) if nanos > 0 => {
                        tokio::time::timeout(Duration::from_nanos(nanos), work)
                            .await
                            .unwrap_or_else(|_| {
                                Err(Status::new(
                                    Code::DeadlineExceeded,
                                    "not done within the caller's time-out",
                                ))
                            })
                    }
                    _ => work.await,
                },
            };
            let _ = frames.send(rpc::encode_response(id, result)).await;
        });
    }

    async fn open_stream(&mut self, header: Header, payload: &[u8]) -> Result<(), Gone> {
        let refuse = |code, text: String| {
            rpc::encode_response(header.stream_id, Err(Status::new(code, text)))
        };
        let request = match Request::decode(payload) {
            Ok(request) => request,
            Err(e) => {
                let text = format!("the frame holds no ttrpc request: {e}");
                return self.answer(refuse(Code::InvalidArgument, text)).await;
            }
        };
        if request.service != STREAMING || request.method != "Stream" {
            let text = format!(
                "no streaming call {:?} of {:?} here",
                short(&request.method),
                short(&request.service)
            );
            return self.answer(refuse(Code::Unimplemented, text)).await;
        }
        if self.open.len() >= MAX_STREAMS || self.open.contains_key(&header.stream_id) {
            let text = format!("{MAX_STREAMS} streams are open on this connection");
            return self.answer(refuse(Code::ResourceExhausted, text)).await;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.streamed = true;
        self.open.insert(
            header.stream_id,
            Open {
                messages: Some(sender),
                unnamed: Some(receiver),
            },
        );
        Ok(())
    }

    async fn data(&mut self, header: Header, payload: &[u8]) -> Result<(), Gone> {
        let id = header.stream_id;
        let Some(open) = self.open.get_mut(&id) else {
            // Of a stream that has ended: its sender does not know yet.
            return Ok(());
        };
        if header.flags & FLAG_NO_DATA == 0 {
            let Ok(any) = Any::decode(payload) else {
                self.open.remove(&id);
                let status = Status::new(Code::InvalidArgument, "the frame holds no Any");
                return self.answer(rpc::encode_response(id, Err(status))).await;
            };
            if let Some(messages) = open.unnamed.take() {
                return self.name(id, &any, messages).await;
            }
            if let Some(messages) = &open.messages
                && messages.send(Incoming::Message(any)).await.is_err()
            {
                // Our side has finished with it.
                open.messages = None;
            }
        }
        if header.flags & FLAG_REMOTE_CLOSED != 0
            && let Some(open) = self.open.remove(&id)
            && let Some(messages) = open.messages
        {
            let _ = messages.send(Incoming::Closed).await;
        }
        Ok(())
    }

    /// The first message says which stream it is; it is acknowledged with an empty message.
    async fn name(
        &mut self,
        id: u32,
        any: &Any,
        messages: mpsc::Receiver<Incoming>,
    ) -> Result<(), Gone> {
        let init = StreamInit::decode(any.value.as_slice());
        let result = match init {
            Ok(init) if any.type_url.ends_with(STREAM_INIT) => {
                // Acknowledged before anything is sent on it: the queue keeps the order.
                let ack = frame::encode(id, TYPE_DATA, &Any::default());
                self.answer(ack.unwrap_or_default()).await?;
                let peer = Peer::new(id, messages, self.frames.clone());
                self.streams.offer(&init.id, peer)
            }
            _ => Err(Status::new(
                Code::InvalidArgument,
                format!(
                    "the first message is a {:?}, not StreamInit",
                    short(&any.type_url)
                ),
            )),
        };
        if let Err(status) = result {
            self.open.remove(&id);
            return self.answer(rpc::encode_response(id, Err(status))).await;
        }
        Ok(())
    }
}

/// A frame that tells the caller that no more will come on a stream.
pub(super) fn closed(stream_id: u32) -> Vec<u8> {
    Header {
        length: 0,
        stream_id,
        kind: TYPE_DATA,
        flags: FLAG_REMOTE_CLOSED | FLAG_NO_DATA,
    }
    .encode()
    .to_vec()
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}
