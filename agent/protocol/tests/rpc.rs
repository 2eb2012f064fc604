//! Our client against our server, and both against a peer that lies.

mod common;

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::client::{Client, ClientOptions, RpcError, TaskClient};
use bulkhead_protocol::frame::{self, Header};
use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::server::{Router, TaskDispatch};
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Empty};
use common::Fake;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn serve(fake: &Arc<Fake>) -> tokio::io::DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let router = Router::new().with(TaskDispatch(fake.clone()));
    tokio::spawn(async move { router.serve(theirs).await });
    ours
}

#[tokio::test]
async fn calls_are_multiplexed_and_errors_are_passed_on() {
    let fake = Arc::new(Fake::default());
    let tasks = TaskClient::new(Client::new(serve(&fake)));
    let waiter = tokio::spawn({
        let tasks = tasks.clone();
        async move { tasks.wait(&WaitRequest::default()).await }
    });
    for _ in 0..100 {
        assert_eq!(tasks.start(&StartRequest::default()).await.unwrap().pid, 42);
    }
    assert!(!waiter.is_finished());
    fake.exited.notify_one();
    assert_eq!(waiter.await.unwrap().unwrap().exit_status, 7);

    let request = CreateTaskRequest {
        id: "taken".into(),
        ..Default::default()
    };
    let error = tasks.create(&request).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::AlreadyExists));
    assert_eq!(
        error.to_string(),
        "Create: container taken: exists (AlreadyExists)"
    );
}

#[tokio::test]
async fn unknown_services_methods_and_bad_arguments_are_answered() {
    let client = Client::new(serve(&Arc::new(Fake::default())));
    let call = async |service: &str, method: &str, request: &Any| {
        client
            .call::<_, Empty>(service, method, request)
            .await
            .unwrap_err()
            .code()
    };
    let none = Any::default();
    assert_eq!(
        call("nope", "Create", &none).await,
        Some(Code::Unimplemented)
    );
    assert_eq!(
        call(SERVICE, "Nope", &none).await,
        Some(Code::Unimplemented)
    );
    let bad = Any {
        type_url: String::new(),
        // field 2 of StateRequest is a string: this is not UTF-8
        value: vec![0xff, 0xfe],
    };
    assert_eq!(
        call(SERVICE, "State", &bad).await,
        Some(Code::InvalidArgument)
    );
    let tasks = TaskClient::new(client);
    assert!(tasks.pause(&PauseRequest::default()).await.is_ok());
}

#[tokio::test]
async fn a_call_without_an_answer_times_out_and_the_connection_goes_on() {
    let fake = Arc::new(Fake::default());
    let client = Client::new(serve(&fake));
    let error = client
        .call_for::<_, WaitResponse>(
            SERVICE,
            "Wait",
            &WaitRequest::default(),
            Some(Duration::from_millis(20)),
        )
        .await
        .unwrap_err();
    // Either side may be first to notice.
    assert!(
        matches!(error, RpcError::Timeout { .. }) || error.code() == Some(Code::DeadlineExceeded),
        "{error}"
    );
    let tasks = TaskClient::new(client);
    assert!(tasks.resume(&ResumeRequest::default()).await.is_ok());
}

#[tokio::test]
async fn large_messages_pass_up_to_the_limits() {
    let fake = Arc::new(Fake::default());
    let stream = serve(&fake);
    let tasks = TaskClient::new(Client::with_options(
        stream,
        ClientOptions {
            max_answer: 1 << 20,
            ..Default::default()
        },
    ));
    // A request just under 4 MiB is taken.
    let mut request = UpdateTaskRequest {
        annotations: [("a".into(), "b".into())].into(),
        resources: Some(Any {
            type_url: String::new(),
            value: vec![1; frame::MAX_MESSAGE - 200],
        }),
        ..Default::default()
    };
    tasks.update(&request).await.unwrap();
    request.id = "x".repeat(300);
    assert!(matches!(
        tasks.update(&request).await,
        Err(RpcError::TooLong { .. })
    ));
    // An answer above the client's own limit fails that call only.
    let stats = async |size: usize| {
        tasks
            .stats(&StatsRequest {
                id: size.to_string(),
            })
            .await
    };
    assert!(stats(900_000).await.is_ok());
    assert!(matches!(
        stats(1_100_000).await,
        Err(RpcError::BadAnswer { .. })
    ));
    // One above ttrpc's limit is the server's to refuse.
    assert_eq!(
        stats(frame::MAX_MESSAGE).await.unwrap_err().code(),
        Some(Code::ResourceExhausted)
    );
    assert!(stats(10).await.is_ok());
}

#[tokio::test]
async fn server_survives_garbage_frames() {
    let mut stream = serve(&Arc::new(Fake::default()));
    let mut send = Vec::new();
    let mut frame = |stream_id, kind, flags, payload: &[u8]| {
        let header = Header {
            length: payload.len() as u32,
            stream_id,
            kind,
            flags,
        };
        send.extend_from_slice(&header.encode());
        send.extend_from_slice(payload);
    };
    frame(1, 77, 0, b"unknown kind: ignored");
    frame(3, frame::TYPE_DATA, 0, b"data: ignored");
    frame(5, frame::TYPE_REQUEST, frame::FLAG_REMOTE_OPEN, b"");
    frame(7, frame::TYPE_REQUEST, 0, &[0xff; 30]);
    frame(9, frame::TYPE_REQUEST, 0, &vec![0; frame::MAX_MESSAGE + 1]);
    frame(11, frame::TYPE_REQUEST, 0, b"");
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sender = tokio::spawn(async move {
        writer.write_all(&send).await.unwrap();
        writer
    });
    let mut codes = Vec::new();
    let mut decoder = frame::Decoder::new(frame::MAX_MESSAGE);
    while codes.len() < 4 {
        let mut buffer = [0; 512];
        let n = reader.read(&mut buffer).await.unwrap();
        assert!(n > 0);
        let mut input = &buffer[..n];
        while let Some(f) = decoder.feed(&mut input) {
            let frame::Frame::Message { header, payload } = f else {
                panic!("{f:?}")
            };
            let response =
                <bulkhead_protocol::rpc::Response as prost::Message>::decode(payload.as_slice())
                    .unwrap();
            let code = response.into_result().unwrap_err().code;
            codes.push((header.stream_id, Code::try_from(code).unwrap()));
        }
    }
    assert_eq!(
        codes,
        [
            (5, Code::Unimplemented),
            (7, Code::InvalidArgument),
            (9, Code::ResourceExhausted),
            (11, Code::Unimplemented),
        ]
    );
    drop(sender.await.unwrap());
    stream = serve(&Arc::new(Fake::default()));
    drop(stream);
}

#[tokio::test]
async fn client_survives_a_lying_server() {
    let (ours, mut theirs) = tokio::io::duplex(1 << 12);
    let client = Client::new(ours);
    let tasks = TaskClient::new(client.clone());
    let call = tokio::spawn({
        let tasks = tasks.clone();
        async move { tasks.start(&StartRequest::default()).await }
    });
    let mut header = [0; frame::HEADER_LEN];
    theirs.read_exact(&mut header).await.unwrap();
    let id = Header::decode(header).stream_id;
    let mut request = vec![0; Header::decode(header).length as usize];
    theirs.read_exact(&mut request).await.unwrap();
    let mut lie = async |stream_id, kind, length: u32, payload: &[u8]| {
        let header = Header {
            length,
            stream_id,
            kind,
            flags: 0,
        };
        theirs.write_all(&header.encode()).await.unwrap();
        theirs.write_all(payload).await.unwrap();
    };
    lie(99, frame::TYPE_RESPONSE, 3, b"abc").await; // nobody asked
    lie(id, frame::TYPE_REQUEST, 3, b"abc").await; // not an answer
    lie(id, frame::TYPE_RESPONSE, 3, &[0xff; 3]).await; // not a Response
    assert!(matches!(
        call.await.unwrap(),
        Err(RpcError::BadAnswer { .. })
    ));
    // The stream ends within a frame: calls fail, later ones too.
    let call = tokio::spawn({
        let tasks = tasks.clone();
        async move { tasks.start(&StartRequest::default()).await }
    });
    theirs.read_exact(&mut header).await.unwrap();
    theirs.write_all(&[0, 0]).await.unwrap();
    drop(theirs);
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, RpcError::Closed { .. }), "{error}");
    assert!(client.is_closed());
    assert!(matches!(
        tasks.start(&StartRequest::default()).await,
        Err(RpcError::Closed { .. })
    ));
}

#[tokio::test]
async fn calls_end_with_their_connection_and_clients_close_it() {
    let fake = Arc::new(Fake::default());
    let (ours, theirs) = tokio::io::duplex(1 << 12);
    let router = Router::new().with(TaskDispatch(fake.clone()));
    let server = tokio::spawn(async move { router.serve(theirs).await });
    let client = Client::new(ours);
    let tasks = TaskClient::new(client);
    let waiter = tokio::spawn(async move { tasks.wait(&WaitRequest::default()).await });
    waiter.abort();
    let _ = waiter.await;
    // The last client is gone, so the server sees the end and drops the Wait under way.
    server.await.unwrap().unwrap();
    assert_eq!(Arc::strong_count(&fake), 1);
}

#[tokio::test]
async fn too_many_calls_at_once_are_refused() {
    let fake = Arc::new(Fake::default());
    let client = Client::new(serve(&fake));
    let tasks = TaskClient::new(client);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..=bulkhead_protocol::MAX_CALLS_PER_CONNECTION {
        let tasks = tasks.clone();
        calls.spawn(async move { tasks.wait(&WaitRequest::default()).await });
    }
    let first = calls.join_next().await.unwrap().unwrap();
    assert_eq!(first.unwrap_err().code(), Some(Code::ResourceExhausted));
}

#[tokio::test]
async fn stream_header_is_exchanged_without_reading_past_it() {
    use bulkhead_protocol::stream;
    let (mut host, mut guest) = tokio::io::duplex(64);
    let guest = tokio::spawn(async move {
        let mut line = [0; 5];
        guest.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"c1-o\n");
        guest.write_all(b"ok\nhello").await.unwrap();
    });
    stream::connect(&mut host, "c1-o").await.unwrap();
    let mut rest = String::new();
    host.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "hello");
    guest.await.unwrap();
}
