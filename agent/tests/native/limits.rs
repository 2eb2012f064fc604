//! Limits and what belongs to the whole machine: only in a VM, where it is all ours.

use bulkhead_protocol::metrics::Metrics;
use bulkhead_protocol::sandbox::{self, EventKind};
use bulkhead_protocol::task;
use bulkhead_protocol::types::Any;
use prost::Message;
use serde_json::{Value, json};

use crate::fixture::{Agent, process};

macro_rules! vm_agent {
    () => {{
        let agent = crate::agent!();
        if !agent.in_vm() {
            crate::fixture::skipped("only in a VM (agent/tests/vm)");
            return;
        }
        agent
    }};
}

async fn metrics(agent: &Agent, id: &str) -> Metrics {
    let request = task::StatsRequest { id: id.into() };
    let stats = agent.tasks.stats(&request).await.unwrap().stats.unwrap();
    Metrics::decode(stats.value.as_slice()).unwrap()
}

async fn update(agent: &Agent, id: &str, resources: &Value) {
    let request = task::UpdateTaskRequest {
        id: id.into(),
        resources: Some(Any {
            type_url: sandbox::OCI_RESOURCES_TYPE_URL.into(),
            value: serde_json::to_vec(resources).unwrap(),
        }),
        ..Default::default()
    };
    agent.tasks.update(&request).await.unwrap();
}

#[tokio::test]
async fn a_container_over_its_memory_is_killed_and_reported() {
    let agent = vm_agent!();
    let mut after = agent.newest_event().await;
    let (request, mut spec) = agent.request("c1", &["tail", "/dev/zero"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    let output = agent.run_spec(request, &spec, "").await;
    assert_eq!(output.status, 137);
    let (mut oom, mut exit) = (false, false);
    while !(oom && exit) {
        let request = sandbox::WaitEventRequest {
            after,
            timeout_ms: 60_000,
        };
        let events = agent.sandbox.wait_event(&request).await.unwrap().events;
        assert!(!events.is_empty(), "no event: oom {oom}, exit {exit}");
        for event in events {
            after = event.sequence;
            match event.kind {
                Some(EventKind::Oom(e)) => oom |= e.container_id == "c1" && e.oom_kills > 0,
                Some(EventKind::Exit(e)) => exit |= e.container_id == "c1" && e.exit_status == 137,
                None => {}
            }
        }
    }
}

#[tokio::test]
async fn limits_are_set_changed_and_reported() {
    let agent = vm_agent!();
    let (request, mut spec) = agent.request("c1", &["sleep", "1000"]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20},
        "pids": {"limit": 10},
        "cpu": {"shares": 512, "quota": 20000, "period": 100000},
    });
    agent.create(request, &spec, "").await.unwrap();
    agent.start_task("c1").await;
    let m = metrics(&agent, "c1").await;
    assert_eq!(m.memory.unwrap().usage_limit, 64 << 20);
    assert!(m.memory.unwrap().usage > 0);
    assert_eq!(
        (m.pids.unwrap().current, m.pids.unwrap().limit),
        (1, 10),
        "{m:?}"
    );

    // Ten processes and no more.
    let many = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 & done; echo all";
    let output = agent.exec("c1", &process(&["sh", "-c", many])).await;
    assert!(!output.stdout.contains("all"), "{output:?}");
    assert!(output.stderr.contains("fork"), "{output:?}");

    update(
        &agent,
        "c1",
        &json!({"memory": {"limit": 96 << 20}, "pids": {"limit": 30}, "cpu": {"quota": -1}}),
    )
    .await;
    let m = metrics(&agent, "c1").await;
    assert_eq!(m.memory.unwrap().usage_limit, 96 << 20);
    assert_eq!(m.pids.unwrap().limit, 30);
    agent.destroy("c1").await;
}

#[tokio::test]
async fn the_clock_and_the_processors_are_the_hosts_to_set() {
    let agent = vm_agent!();
    let time = sandbox::SetTimeRequest {
        seconds: 1_900_000_000,
        nanos: 0,
    };
    agent.sandbox.set_time(&time).await.unwrap();
    let output = agent.run("c1", &["date", "+%s"]).await;
    let seen: i64 = output.stdout.trim().parse().unwrap();
    assert!((1_900_000_000..1_900_000_600).contains(&seen), "{seen}");
    let wrong = sandbox::SetTimeRequest {
        seconds: 0,
        nanos: 1_000_000_000,
    };
    assert!(agent.sandbox.set_time(&wrong).await.is_err());

    let online = async |cpus| {
        let request = sandbox::OnlineResourcesRequest { cpus, memory: true };
        let result = agent.sandbox.online_resources(&request).await.unwrap();
        result.cpus_online
    };
    let all = online(32).await;
    println!("processors: {all}");
    assert_eq!(online(all).await, all);
    let info = agent
        .sandbox
        .get_info(&sandbox::GetInfoRequest {})
        .await
        .unwrap();
    for feature in ["cgroup2", "freezer", "seccomp", "network"] {
        assert!(info.features.iter().any(|f| f == feature), "{info:?}");
    }
    let stages: Vec<_> = info.boot.iter().map(|s| s.name.as_str()).collect();
    println!("boot: {:?}", info.boot);
    assert_eq!(stages[..3], ["agent started", "mounted", "listening"]);
}
