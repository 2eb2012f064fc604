//! Against the `ttrpc` crate and containerd's own messages, both directions.

mod common;

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::client::{Client, TaskClient};
use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::server::{Router, TaskDispatch};
use bulkhead_protocol::types::Any;
use bulkhead_protocol::{metrics, sandbox, task, types};
use common::{EXITED_AT, Fake};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics as their_metrics;
use containerd_shim_protos::shim_async as theirs;
use containerd_shim_protos::types::mount::Mount as TheirMount;
use prost::Message as _;
use protobuf::Message as _;
use tokio::net::{UnixListener, UnixStream};
use ttrpc::context;

fn their_any(value: &[u8]) -> protobuf::MessageField<protobuf::well_known_types::any::Any> {
    protobuf::MessageField::some(protobuf::well_known_types::any::Any {
        type_url: "t".into(),
        value: value.to_vec(),
        ..Default::default()
    })
}

/// Their client, every method, our server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn their_client_our_server() {
    let fake = Arc::new(Fake::default());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let router = Router::new().with(TaskDispatch(fake.clone()));
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        router.serve(stream).await
    });
    let client = ttrpc::asynchronous::Client::connect(&format!("unix://{}", path.display()))
        .await
        .unwrap();
    let tasks = theirs::TaskClient::new(client);
    let ctx = || context::with_duration(std::time::Duration::from_secs(20));

    let create = api::CreateTaskRequest {
        id: "c".into(),
        terminal: true,
        rootfs: vec![TheirMount::default(), TheirMount::default()],
        ..Default::default()
    };
    assert_eq!(tasks.create(ctx(), &create).await.unwrap().pid, 2001);
    let taken = api::CreateTaskRequest {
        id: "taken".into(),
        ..Default::default()
    };
    match tasks.create(ctx(), &taken).await.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => {
            assert_eq!(status.code(), ttrpc::Code::ALREADY_EXISTS);
            assert_eq!(status.message(), "container taken: exists");
        }
        other => panic!("{other}"),
    }
    let start = tasks.start(ctx(), &api::StartRequest::default()).await;
    assert_eq!(start.unwrap().pid, 42);
    let state = api::StateRequest {
        id: "c".into(),
        exec_id: "x".into(),
        ..Default::default()
    };
    let state = tasks.state(ctx(), &state).await.unwrap();
    assert_eq!(
        (state.id.as_str(), state.exec_id.as_str(), state.pid),
        ("c", "x", 7)
    );
    assert_eq!(state.status.value(), types::ProcessStatus::Paused as i32);
    assert_eq!(
        (
            state.bundle.as_str(),
            state.stdin.as_str(),
            state.stdout.as_str(),
            state.stderr.as_str()
        ),
        ("/b", "i", "o", "e")
    );
    assert!(state.terminal);
    assert_eq!(state.exit_status, 137);
    assert_eq!(
        (state.exited_at.seconds, state.exited_at.nanos),
        (EXITED_AT.seconds, EXITED_AT.nanos)
    );
    let delete = tasks
        .delete(ctx(), &api::DeleteRequest::default())
        .await
        .unwrap();
    assert_eq!((delete.pid, delete.exit_status), (9, 3));
    let exec = api::ExecProcessRequest {
        exec_id: "e1".into(),
        terminal: true,
        spec: their_any(b"{}"),
        ..Default::default()
    };
    tasks.exec(ctx(), &exec).await.unwrap();
    let resize = api::ResizePtyRequest {
        width: 132,
        height: 43,
        ..Default::default()
    };
    tasks.resize_pty(ctx(), &resize).await.unwrap();
    let close = api::CloseIORequest {
        stdin: true,
        ..Default::default()
    };
    tasks.close_io(ctx(), &close).await.unwrap();
    let kill = api::KillRequest {
        signal: 15,
        all: true,
        ..Default::default()
    };
    tasks.kill(ctx(), &kill).await.unwrap();
    fake.exited.notify_one();
    let wait = tasks
        .wait(ctx(), &api::WaitRequest::default())
        .await
        .unwrap();
    assert_eq!(wait.exit_status, 7);
    let pids = tasks
        .pids(ctx(), &api::PidsRequest::default())
        .await
        .unwrap();
    let pids: Vec<_> = pids.processes.iter().map(|p| p.pid).collect();
    assert_eq!(pids, [1, 70_000]);
    tasks
        .pause(ctx(), &api::PauseRequest::default())
        .await
        .unwrap();
    tasks
        .resume(ctx(), &api::ResumeRequest::default())
        .await
        .unwrap();
    let update = api::UpdateTaskRequest {
        annotations: [("a".to_owned(), "b".to_owned())].into(),
        ..Default::default()
    };
    tasks.update(ctx(), &update).await.unwrap();
    let connect = tasks
        .connect(ctx(), &api::ConnectRequest::default())
        .await
        .unwrap();
    assert_eq!(
        (connect.shim_pid, connect.task_pid, connect.version.as_str()),
        (1, 2, "v")
    );
    tasks
        .shutdown(ctx(), &api::ShutdownRequest::default())
        .await
        .unwrap();

    let stats = tasks
        .stats(ctx(), &api::StatsRequest::default())
        .await
        .unwrap();
    assert_eq!(stats.stats.type_url, metrics::METRICS_TYPE_URL);
    let m = their_metrics::Metrics::parse_from_bytes(&stats.stats.value).unwrap();
    assert_eq!((m.pids.current, m.pids.limit), (3, 100));
    assert_eq!((m.cpu.usage_usec, m.cpu.throttled_usec), (12_345, 6));
    assert_eq!(
        (m.memory.usage, m.memory.usage_limit, m.memory.pgmajfault),
        (1 << 40, u64::MAX, 19)
    );
    assert_eq!(
        (
            m.io.usage[0].major,
            m.io.usage[0].rbytes,
            m.io.usage[0].wios
        ),
        (254, 512, 2)
    );
    assert_eq!(m.memory_events.oom_kill, 1);
}

#[derive(Default)]
struct Theirs;

#[async_trait]
impl theirs::Task for Theirs {
    async fn create(
        &self,
        _: &ttrpc::asynchronous::TtrpcContext,
        r: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        assert_eq!(
            (r.id.as_str(), r.bundle.as_str(), r.terminal),
            ("c", "/bundle", true)
        );
        assert_eq!(
            (r.stdin.as_str(), r.stdout.as_str(), r.stderr.as_str()),
            ("i", "o", "e")
        );
        let mount = &r.rootfs[0];
        assert_eq!(
            (
                mount.type_.as_str(),
                mount.source.as_str(),
                mount.target.as_str()
            ),
            ("virtiofs", "share", "t")
        );
        assert_eq!(mount.options, ["ro", "nosuid"]);
        assert_eq!(
            (r.checkpoint.as_str(), r.parent_checkpoint.as_str()),
            ("k", "p")
        );
        assert_eq!(r.options.type_url, sandbox::CONTAINER_OPTIONS_TYPE_URL);
        let options = sandbox::ContainerOptions::decode(r.options.value.as_slice()).unwrap();
        assert_eq!(options.oci_spec, b"{}");
        Ok(api::CreateTaskResponse {
            pid: 5,
            ..Default::default()
        })
    }

    async fn update(
        &self,
        _: &ttrpc::asynchronous::TtrpcContext,
        r: api::UpdateTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        assert_eq!(r.annotations["k"], "v");
        assert_eq!(r.resources.value, b"{}");
        Ok(api::Empty::default())
    }
}

/// Our client, their server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_their_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = format!("unix://{}", path.display());
    let mut server = ttrpc::asynchronous::Server::new()
        .bind(&address)
        .unwrap()
        .register_service(theirs::create_task(Arc::new(Theirs)));
    server.start().await.unwrap();
    let tasks = TaskClient::new(Client::new(UnixStream::connect(&path).await.unwrap()));
    let options = sandbox::ContainerOptions {
        oci_spec: b"{}".to_vec(),
        ..Default::default()
    };
    let create = task::CreateTaskRequest {
        id: "c".into(),
        bundle: "/bundle".into(),
        rootfs: vec![types::Mount {
            r#type: "virtiofs".into(),
            source: "share".into(),
            target: "t".into(),
            options: vec!["ro".into(), "nosuid".into()],
        }],
        terminal: true,
        stdin: "i".into(),
        stdout: "o".into(),
        stderr: "e".into(),
        checkpoint: "k".into(),
        parent_checkpoint: "p".into(),
        options: Some(Any::of(sandbox::CONTAINER_OPTIONS_TYPE_URL, &options)),
    };
    assert_eq!(tasks.create(&create).await.unwrap().pid, 5);
    let update = task::UpdateTaskRequest {
        id: "c".into(),
        resources: Some(Any {
            type_url: sandbox::OCI_RESOURCES_TYPE_URL.into(),
            value: b"{}".to_vec(),
        }),
        annotations: [("k".to_owned(), "v".to_owned())].into(),
    };
    tasks.update(&update).await.unwrap();
    // A method their server does not have.
    let error = tasks.pids(&task::PidsRequest::default()).await.unwrap_err();
    assert!(
        matches!(error.code(), Some(Code::NotFound | Code::Unimplemented)),
        "{error}"
    );
    server.shutdown().await.unwrap();
}

/// Field by field: what they encode we decode and encode to the same bytes.
#[test]
fn messages_agree_with_containerds() {
    fn same<T: prost::Message + Default + std::fmt::Debug>(theirs: &impl protobuf::Message) {
        let bytes = theirs.write_to_bytes().unwrap();
        let ours = T::decode(bytes.as_slice()).unwrap();
        assert_eq!(ours.encode_to_vec(), bytes, "{ours:?}");
        assert!(!bytes.is_empty());
    }
    let time = || {
        protobuf::MessageField::some(protobuf::well_known_types::timestamp::Timestamp {
            seconds: -5,
            nanos: 6,
            ..Default::default()
        })
    };
    let (id, exec_id) = ("id".to_owned(), "exec".to_owned());
    same::<task::DeleteResponse>(&api::DeleteResponse {
        pid: 1,
        exit_status: 2,
        exited_at: time(),
        ..Default::default()
    });
    same::<task::WaitResponse>(&api::WaitResponse {
        exit_status: 2,
        exited_at: time(),
        ..Default::default()
    });
    same::<task::KillRequest>(&api::KillRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        signal: 9,
        all: true,
        ..Default::default()
    });
    same::<task::ResizePtyRequest>(&api::ResizePtyRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        width: 1,
        height: 2,
        ..Default::default()
    });
    same::<task::CloseIoRequest>(&api::CloseIORequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        stdin: true,
        ..Default::default()
    });
    same::<task::ExecProcessRequest>(&api::ExecProcessRequest {
        id: id.clone(),
        exec_id,
        terminal: true,
        stdin: "a".into(),
        stdout: "b".into(),
        stderr: "c".into(),
        spec: their_any(b"x"),
        ..Default::default()
    });
    same::<task::CheckpointTaskRequest>(&api::CheckpointTaskRequest {
        id: id.clone(),
        path: "p".into(),
        options: their_any(b"x"),
        ..Default::default()
    });
    same::<task::ShutdownRequest>(&api::ShutdownRequest {
        id,
        now: true,
        ..Default::default()
    });
    same::<task::ConnectResponse>(&api::ConnectResponse {
        shim_pid: 1,
        task_pid: 2,
        version: "v".into(),
        ..Default::default()
    });
    same::<metrics::Metrics>(&every_metric());
}

/// A metrics message with a different value in every field.
fn every_metric() -> their_metrics::Metrics {
    use protobuf::reflect::{ReflectValueBox, RuntimeFieldType, RuntimeType};

    fn fill(message: &mut dyn protobuf::MessageDyn, next: &mut u32) {
        let descriptor = message.descriptor_dyn();
        for field in descriptor.fields() {
            let value = |kind: &RuntimeType, next: &mut u32| {
                *next += 1;
                match kind {
                    RuntimeType::U64 => ReflectValueBox::U64(u64::from(*next)),
                    RuntimeType::U32 => ReflectValueBox::U32(*next),
                    RuntimeType::F64 => ReflectValueBox::F64(f64::from(*next)),
                    RuntimeType::String => ReflectValueBox::String(next.to_string()),
                    RuntimeType::Message(m) => {
                        let mut inner = m.new_instance();
                        fill(inner.as_mut(), next);
                        ReflectValueBox::Message(inner)
                    }
                    other => panic!("{other:?}"),
                }
            };
            match field.runtime_field_type() {
                RuntimeFieldType::Singular(kind) => {
                    let v = value(&kind, next);
                    field.set_singular_field(message, v);
                }
                RuntimeFieldType::Repeated(kind) => {
                    let v = value(&kind, next);
                    field.mut_repeated(message).push(v);
                }
                RuntimeFieldType::Map(..) => panic!("no maps here"),
            }
        }
    }
    let mut metrics = their_metrics::Metrics::default();
    fill(&mut metrics, &mut 0);
    metrics
}
