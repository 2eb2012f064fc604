//! The services' methods, once: the typed calls, the clients, the server traits and their
//! dispatch are all made from these tables.

use alloc::string::String;

use prost::Message;

use crate::rpc::{Code, Status};
use crate::{sandbox, task, types};

/// `timed` calls get the client's default timeout, `untimed` ones wait for an event.
macro_rules! task_methods {
    ($make:ident) => {
        $make! {
            task::SERVICE, TaskCall, TaskClient, TaskService, TaskDispatch, "containerd.task.v3.Task";
            /// Makes a container, ready to start.
            Create create task::CreateTaskRequest => task::CreateTaskResponse, timed;
            /// Starts the container, or a process added by Exec.
            Start start task::StartRequest => task::StartResponse, timed;
            /// Where a process stands.
            State state task::StateRequest => task::StateResponse, timed;
            /// Removes what has ended.
            Delete delete task::DeleteRequest => task::DeleteResponse, timed;
            /// Adds a process to a running container; Start runs it.
            Exec exec task::ExecProcessRequest => types::Empty, timed;
            /// Sets the size of the terminal.
            ResizePty resize_pty task::ResizePtyRequest => types::Empty, timed;
            /// Ends standard input after what has arrived.
            CloseIO close_io task::CloseIoRequest => types::Empty, timed;
            /// Sends a signal.
            Kill kill task::KillRequest => types::Empty, timed;
            /// Waits for a process to end.
            Wait wait task::WaitRequest => task::WaitResponse, untimed;
            /// Processes of a container.
            Pids pids task::PidsRequest => task::PidsResponse, timed;
            /// Freezes a container.
            Pause pause task::PauseRequest => types::Empty, timed;
            /// Thaws a container.
            Resume resume task::ResumeRequest => types::Empty, timed;
            /// Not supported by any guest so far.
            Checkpoint checkpoint task::CheckpointTaskRequest => types::Empty, timed;
            /// Changes resource limits.
            Update update task::UpdateTaskRequest => types::Empty, timed;
            /// Resource use.
            Stats stats task::StatsRequest => task::StatsResponse, timed;
            /// Process ids and version.
            Connect connect task::ConnectRequest => task::ConnectResponse, timed;
            /// Nothing in a sandbox: its life ends with Sandbox.Shutdown.
            Shutdown shutdown task::ShutdownRequest => types::Empty, timed;
        }
    };
}

macro_rules! sandbox_methods {
    ($make:ident) => {
        $make! {
            sandbox::SERVICE, SandboxCall, SandboxClient, SandboxService, SandboxDispatch, "bulkhead.agent.v1.Sandbox";
            /// Versions and the boot's time line.
            GetInfo get_info sandbox::GetInfoRequest => sandbox::GetInfoResponse, timed;
            /// Answers: the guest is alive.
            Check check types::Empty => types::Empty, timed;
            /// Sets up names, shares, sysctls and the network.
            ConfigureSandbox configure_sandbox sandbox::ConfigureSandboxRequest => sandbox::ConfigureSandboxResponse, timed;
            /// Sets the wall clock.
            SetTime set_time sandbox::SetTimeRequest => types::Empty, timed;
            /// Feeds the kernel's random generator.
            AddEntropy add_entropy sandbox::AddEntropyRequest => types::Empty, timed;
            /// Brings CPUs and memory online.
            OnlineResources online_resources sandbox::OnlineResourcesRequest => sandbox::OnlineResourcesResponse, timed;
            /// Waits for events.
            WaitEvent wait_event sandbox::WaitEventRequest => sandbox::WaitEventResponse, untimed;
            /// Ends all containers and the guest.
            Shutdown shutdown sandbox::ShutdownRequest => types::Empty, timed;
        }
    };
}

#[cfg(feature = "tokio")]
pub(crate) use {sandbox_methods, task_methods};

fn decode<M: Message + Default>(method: &str, payload: &[u8]) -> Result<M, Status> {
    M::decode(payload).map_err(|error| {
        Status::new(
            Code::InvalidArgument,
            alloc::format!("argument of {method} cannot be decoded: {error}"),
        )
    })
}

fn no_method(service: &str, method: &str) -> Status {
    let method: String = method.chars().take(64).collect();
    Status::new(
        Code::Unimplemented,
        alloc::format!("{service} has no method {method:?}"),
    )
}

macro_rules! make_call {
    ($service:expr, $call:ident, $client:ident, $trait:ident, $dispatch:ident, $name:literal;
     $($(#[$doc:meta])* $method:ident $function:ident $request:ty => $response:ty, $timed:ident;)*) => {
        #[doc = concat!("A call to `", $name, "` with its decoded argument.")]
        #[derive(Clone, Debug, PartialEq)]
        #[allow(
            clippy::large_enum_variant,
            reason = "made once per call and taken apart at once"
        )]
        pub enum $call {
            $($(#[$doc])* $method($request),)*
        }

        impl $call {
            /// Decodes the argument of `method`; UNIMPLEMENTED for unknown methods.
            pub fn decode(method: &str, payload: &[u8]) -> Result<Self, Status> {
                match method {
                    $(stringify!($method) => decode(method, payload).map(Self::$method),)*
                    _ => Err(no_method($service, method)),
                }
            }

            /// The method's name.
            #[must_use]
            pub fn method(&self) -> &'static str {
                match self {
                    $(Self::$method(_) => stringify!($method),)*
                }
            }
        }
    };
}

task_methods!(make_call);
sandbox_methods!(make_call);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unknown_methods_are_unimplemented() {
        let error = TaskCall::decode("Nope", &[]).unwrap_err();
        assert_eq!(error.code, Code::Unimplemented as i32);
        assert!(matches!(
            SandboxCall::decode("Check", &[]),
            Ok(SandboxCall::Check(_))
        ));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            for method in ["Create", "Exec", "Kill", "Update", "Wait"] {
                let _ = TaskCall::decode(method, &payload);
            }
            for method in ["ConfigureSandbox", "WaitEvent", "AddEntropy"] {
                let _ = SandboxCall::decode(method, &payload);
            }
        }
    }
}
