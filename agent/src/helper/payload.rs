//! The last step: finding and executing the container's program.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::rpc::Code;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;

/// Search path when the environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// In messages about a program that does not exist; hosts turn it into exit code 127.
const NOT_FOUND: &str = "executable file not found";
/// In messages about a program that cannot be executed; hosts turn it into exit code 126.
const NOT_EXECUTABLE: &str = "not executable";

/// The code for a message that has come through libcontainer as text.
pub fn code_of(message: &str) -> Code {
    if message.contains(NOT_FOUND) {
        Code::NotFound
    } else if message.contains(NOT_EXECUTABLE) {
        Code::PermissionDenied
    } else {
        Code::Internal
    }
}

/// Finds the program `name` as the process would: as it is when it has a slash, else in `env`'s
/// PATH. To be called inside the container, as its user.
pub fn find(name: &str, env: &[String]) -> Result<PathBuf, String> {
    if name.is_empty() {
        return Err(format!("exec: no program given: {NOT_FOUND}"));
    }
    let check = |path: &Path| -> Result<(), Errno> {
        nix::unistd::faccessat(
            nix::fcntl::AT_FDCWD,
            path,
            nix::unistd::AccessFlags::X_OK,
            nix::fcntl::AtFlags::AT_EACCESS,
        )?;
        if path.is_dir() {
            return Err(Errno::EISDIR);
        }
        Ok(())
    };
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match check(&path) {
            Ok(()) => Ok(path),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Err(format!("exec: {name:?}: {NOT_FOUND}")),
            Err(errno) => Err(format!("exec: {name:?}: {NOT_EXECUTABLE}: {errno}")),
        };
    }
    let path = env
        .iter()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut refused = None;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => refused = Some(errno),
        }
    }
    Err(match refused {
        Some(errno) => format!("exec: {name:?}: {NOT_EXECUTABLE}: {errno}"),
        None => format!("exec: {name:?}: {NOT_FOUND} in PATH"),
    })
}

/// Executes; returns only on failure, with the reason.
pub fn execute(path: &Path, args: &[String], env: Option<&[String]>) -> String {
    let c_string = |s: &[u8]| CString::new(s).unwrap_or_default();
    let file = c_string(path.as_os_str().as_bytes());
    let args: Vec<CString> = args.iter().map(|a| c_string(a.as_bytes())).collect();
    let result = match env {
        Some(env) => {
            let env: Vec<CString> = env.iter().map(|e| c_string(e.as_bytes())).collect();
            nix::unistd::execve(&file, &args, &env)
        }
        None => nix::unistd::execv(&file, &args),
    };
    let Err(errno) = result;
    match errno {
        // The file is there: what is missing is its interpreter.
        Errno::ENOENT => format!(
            "exec: {:?}: {NOT_FOUND} (its interpreter or dynamic loader)",
            path
        ),
        errno => format!("exec: {path:?}: {NOT_EXECUTABLE}: {errno}"),
    }
}

fn parts(spec: &Spec) -> (Vec<String>, Vec<String>) {
    let process = spec.process().as_ref();
    let args = process.and_then(|p| p.args().clone()).unwrap_or_default();
    let env = process.and_then(|p| p.env().clone()).unwrap_or_default();
    (args, env)
}

/// Executes the program of a spec, for libcontainer.
#[derive(Clone, Debug)]
pub struct Payload;

impl Executor for Payload {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let (args, env) = parts(spec);
        find(args.first().map_or("", String::as_str), &env)
            .map(drop)
            .map_err(ExecutorValidationError::ArgValidationError)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (args, env) = parts(spec);
        let name = args.first().map_or("", String::as_str);
        let message = match find(name, &env) {
            Ok(path) => execute(&path, &args, None),
            Err(message) => message,
        };
        // The container has been started and nobody waits for an error any more: say it where
        // its output goes, and end as a shell would.
        eprintln!("{message}");
        let status = if code_of(&message) == Code::NotFound {
            127
        } else {
            126
        };
        // SAFETY: ends this forked process without running the exit handlers of its parent.
        unsafe { libc::_exit(status) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let env = vec!["PATH=/nonexistent:/bin:/usr/bin".to_owned()];
        assert!(find("sh", &env).unwrap().ends_with("sh"));
        assert!(find("sh", &[]).is_ok());
        assert_eq!(find("/bin/sh", &[]).unwrap(), Path::new("/bin/sh"));
        let code = |name: &str| code_of(&find(name, &env).unwrap_err());
        assert_eq!(code("no-such-program"), Code::NotFound);
        assert_eq!(code("/no/such"), Code::NotFound);
        assert_eq!(code(""), Code::NotFound);
        assert_eq!(code("/etc"), Code::PermissionDenied);
        assert_eq!(code("/etc/passwd"), Code::PermissionDenied);
    }
}
