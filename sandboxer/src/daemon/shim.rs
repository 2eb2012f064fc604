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

/// The answer, for standard output.
///
/// # Errors
/// What only the daemon can do.
pub fn answer(args: &[String]) -> Result<Vec<u8>, String> {
    let has = |name: &str| {
        args.iter()
            .any(|a| a.trim_start_matches('-') == name && a.starts_with('-'))
    };
    if has("info") {
        let info = RuntimeInfo {
            name: "io.containerd.bulkhead-microvm.v1".into(),
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
        _ => Err(
            "this runtime runs containers only in sandboxes of its daemon: set `sandboxer = \
             \"bulkhead-microvm\"` for it in containerd's configuration and make pods by CRI"
                .into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(args: &[&str]) -> Result<Vec<u8>, String> {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        answer(&args)
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
