//! A Task service that answers from its arguments.

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::server::TaskService;
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Empty, ProcessInfo, ProcessStatus, Timestamp};
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub struct Fake {
    /// Lets Wait return.
    pub exited: Notify,
}

fn unsupported() -> Status {
    Status::new(Code::Unimplemented, "not in this fake")
}

pub const EXITED_AT: Timestamp = Timestamp {
    seconds: 1_700_000_000,
    nanos: 999_999_999,
};

impl TaskService for Fake {
    async fn create(&self, r: CreateTaskRequest) -> Result<CreateTaskResponse, Status> {
        if r.id == "taken" {
            return Err(Status::new(Code::AlreadyExists, "container taken: exists"));
        }
        Ok(CreateTaskResponse {
            pid: u32::try_from(r.rootfs.len()).unwrap() * 1000 + u32::from(r.terminal),
        })
    }
    async fn start(&self, _: StartRequest) -> Result<StartResponse, Status> {
        Ok(StartResponse { pid: 42 })
    }
    async fn state(&self, r: StateRequest) -> Result<StateResponse, Status> {
        Ok(StateResponse {
            id: r.id,
            bundle: "/b".into(),
            pid: 7,
            status: ProcessStatus::Paused as i32,
            stdin: "i".into(),
            stdout: "o".into(),
            stderr: "e".into(),
            terminal: true,
            exit_status: 137,
            exited_at: Some(EXITED_AT),
            exec_id: r.exec_id,
        })
    }
    async fn delete(&self, _: DeleteRequest) -> Result<DeleteResponse, Status> {
        Ok(DeleteResponse {
            pid: 9,
            exit_status: 3,
            exited_at: Some(EXITED_AT),
        })
    }
    async fn exec(&self, r: ExecProcessRequest) -> Result<Empty, Status> {
        let spec = r.spec.unwrap_or_default();
        if spec.value == b"{}" && r.exec_id == "e1" && r.terminal {
            return Ok(Empty {});
        }
        Err(unsupported())
    }
    async fn resize_pty(&self, r: ResizePtyRequest) -> Result<Empty, Status> {
        if (r.width, r.height) == (132, 43) {
            return Ok(Empty {});
        }
        Err(unsupported())
    }
    async fn close_io(&self, r: CloseIoRequest) -> Result<Empty, Status> {
        if r.stdin {
            return Ok(Empty {});
        }
        Err(unsupported())
    }
    async fn kill(&self, r: KillRequest) -> Result<Empty, Status> {
        if r.signal == 15 && r.all {
            return Ok(Empty {});
        }
        Err(unsupported())
    }
    async fn wait(&self, _: WaitRequest) -> Result<WaitResponse, Status> {
        self.exited.notified().await;
        Ok(WaitResponse {
            exit_status: 7,
            exited_at: Some(EXITED_AT),
        })
    }
    async fn pids(&self, _: PidsRequest) -> Result<PidsResponse, Status> {
        let process = |pid| ProcessInfo { pid, info: None };
        Ok(PidsResponse {
            processes: vec![process(1), process(70_000)],
        })
    }
    async fn pause(&self, _: PauseRequest) -> Result<Empty, Status> {
        Ok(Empty {})
    }
    async fn resume(&self, _: ResumeRequest) -> Result<Empty, Status> {
        Ok(Empty {})
    }
    async fn checkpoint(&self, _: CheckpointTaskRequest) -> Result<Empty, Status> {
        Err(unsupported())
    }
    async fn update(&self, r: UpdateTaskRequest) -> Result<Empty, Status> {
        if r.annotations.get("a").is_some_and(|v| v == "b") {
            return Ok(Empty {});
        }
        Err(unsupported())
    }
    async fn stats(&self, r: StatsRequest) -> Result<StatsResponse, Status> {
        use bulkhead_protocol::metrics::*;
        let size = r.id.parse().unwrap_or(0);
        Ok(StatsResponse {
            stats: Some(if size > 0 {
                Any {
                    type_url: String::new(),
                    value: vec![1; size],
                }
            } else {
                Any::of(
                    METRICS_TYPE_URL,
                    &Metrics {
                        pids: Some(PidsStat {
                            current: 3,
                            limit: 100,
                        }),
                        cpu: Some(CPUStat {
                            usage_usec: 12_345,
                            throttled_usec: 6,
                            ..Default::default()
                        }),
                        memory: Some(MemoryStat {
                            usage: 1 << 40,
                            usage_limit: u64::MAX,
                            pgmajfault: 19,
                            ..Default::default()
                        }),
                        io: Some(IOStat {
                            usage: vec![IOEntry {
                                major: 254,
                                rbytes: 512,
                                wios: 2,
                                ..Default::default()
                            }],
                            psi: None,
                        }),
                        memory_events: Some(MemoryEvents {
                            oom_kill: 1,
                            ..Default::default()
                        }),
                        ..Default::default()
                    },
                )
            }),
        })
    }
    async fn connect(&self, _: ConnectRequest) -> Result<ConnectResponse, Status> {
        Ok(ConnectResponse {
            shim_pid: 1,
            task_pid: 2,
            version: "v".into(),
        })
    }
    async fn shutdown(&self, _: ShutdownRequest) -> Result<Empty, Status> {
        Ok(Empty {})
    }
}
