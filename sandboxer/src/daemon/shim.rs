//! What containerd asks of a program named after the runtime type, see `bin/containerd-shim.rs`.

use bulkhead_protocol::task::DeleteResponse;
use prost::Message;

use super::events::now;
use super::sandbox::KILLED;

/// `containerd.types.RuntimeInfo`, as far as given.
#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeInfo {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    version: Option<RuntimeVersion>,
}

/// `containerd.types.RuntimeVersion`.
#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeVersion {
    #[prost(string, tag = "1")]
    version: String,
}

/// The runtime that a program is called for: `bulkhead-app` for
/// `/usr/bin/containerd-shim-bulkhead-app-v1`, and the one of this program's own name for any other.
fn runtime(program: &str) -> &str {
    let name = program.rsplit('/').next().unwrap_or_default();
    name.strip_prefix("containerd-shim-")
        .and_then(|name| name.strip_suffix("-v1"))
        .filter(|name| name.starts_with("bulkhead-"))
        .unwrap_or("bulkhead-microvm")
}

/// The answer, for standard output.
///
/// # Errors
/// What only the daemon can do.
pub fn answer(program: &str, args: &[String]) -> Result<Vec<u8>, String> {
    let runtime = runtime(program);
    let has = |name: &str| {
        args.iter()
            .any(|a| a.trim_start_matches('-') == name && a.starts_with('-'))
    };
    if has("info") {
        let info = RuntimeInfo {
            name: format!("io.containerd.{runtime}.v1"),
            version: Some(RuntimeVersion {
                version: env!("CARGO_PKG_VERSION").into(),
            }),
        };
        return Ok(info.encode_to_vec());
    }
    if has("v") || has("version") {
        return Ok(format!("{}\n", env!("CARGO_PKG_VERSION")).into_bytes());
    }
    // The action comes after the options; values of options are not actions' names.
    match args.last().map(String::as_str) {
        // The daemon does not answer for that container: it has ended with its sandbox.
        Some("delete") => Ok(DeleteResponse {
            pid: 0,
            exit_status: KILLED,
            exited_at: Some(now()),
        }
        .encode_to_vec()),
        _ => Err(format!(
            "this runtime runs containers only in sandboxes of its daemon: set `sandboxer = \
             \"{runtime}\"` for it in containerd's configuration and make pods by CRI"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(args: &[&str]) -> Result<Vec<u8>, String> {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        answer("/usr/bin/containerd-shim-bulkhead-microvm-v1", &args)
    }

    #[test]
    fn one_program_answers_for_all_runtimes() {
        for (program, name) in [
            ("/usr/bin/containerd-shim-bulkhead-app-v1", "bulkhead-app"),
            ("containerd-shim-bulkhead-wasm-v1", "bulkhead-wasm"),
            ("shim", "bulkhead-microvm"),
            ("containerd-shim-runc-v2", "bulkhead-microvm"),
            ("", "bulkhead-microvm"),
        ] {
            assert_eq!(runtime(program), name);
        }
    }

    #[test]
    fn containerds_questions_are_answered() {
        let info = RuntimeInfo::decode(ask(&["-info"]).expect("info").as_slice()).expect("decode");
        assert_eq!(info.name, "io.containerd.bulkhead-microvm.v1");
        let delete = ask(&[
            "-namespace",
            "k8s.io",
            "-id",
            "c",
            "-bundle",
            "/b",
            "delete",
        ]);
        let delete = DeleteResponse::decode(delete.expect("delete").as_slice()).expect("decode");
        assert_eq!(delete.exit_status, KILLED);
        assert!(ask(&["-namespace", "k8s.io", "-id", "c", "start"]).is_err());
    }
}
