//! What a command's failure looks like to a person, a program and the shell.

use std::error::Error;
use std::fmt;

use crate::engine::EngineError;
use crate::image::ImageError;
use crate::rundir::RunDirError;
use crate::spec::SpecError;

/// Our own failure, as docker has it.
pub const FAILED: u8 = 125;
/// The program cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
pub const NOT_FOUND: u8 = 127;
/// Ended by Ctrl-C: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// A failed command.
#[derive(Debug)]
pub struct CliError {
    /// A word for programs, stable across versions.
    pub kind: String,
    /// Exit code.
    pub code: u8,
    source: Box<dyn Error + Send + Sync>,
}

impl CliError {
    /// A failure with the ordinary exit code.
    pub fn new(kind: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            kind: kind.to_owned(),
            code: FAILED,
            source: source.into(),
        }
    }

    /// With another exit code.
    #[must_use]
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The user pressed Ctrl-C.
    pub fn interrupted() -> Self {
        Self::new("interrupted", "interrupted").code(INTERRUPTED)
    }

    /// A host call failed.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::from(EngineError::Io {
            what: what.into(),
            source,
        })
    }

    /// Causes beneath the message, outermost first. Messages include their cause where it matters;
    /// repetitions are left out.
    pub fn chain(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut shown = self.to_string();
        let mut next = self.source.source();
        while let Some(cause) = next {
            let text = plain(&cause.to_string());
            if !shown.ends_with(&text) {
                causes.push(text.clone());
            }
            shown = text;
            next = cause.source();
        }
        causes
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&plain(&self.source.to_string()))
    }
}

/// One line whatever was put into it, and words only: the standard library adds `(os error 2)`.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(" (os error ") {
        out.push_str(rest.get(..at).unwrap_or_default());
        let tail = rest.get(at..).unwrap_or_default();
        rest = tail.split_once(')').map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    let clean: String = out
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    clean.trim_end().to_owned()
}

impl From<EngineError> for CliError {
    fn from(error: EngineError) -> Self {
        let code = match &error {
            EngineError::Program { missing: true, .. } => NOT_FOUND,
            EngineError::Program { .. } => NOT_EXECUTABLE,
            _ => FAILED,
        };
        Self {
            kind: error.kind().to_owned(),
            code,
            source: Box::new(error),
        }
    }
}

impl From<bulkhead_vmm::VmError> for CliError {
    fn from(error: bulkhead_vmm::VmError) -> Self {
        EngineError::from(error).into()
    }
}

impl From<ImageError> for CliError {
    fn from(error: ImageError) -> Self {
        let code = if error.kind() == "interrupted" {
            INTERRUPTED
        } else {
            FAILED
        };
        Self {
            kind: error.kind().to_owned(),
            code,
            source: Box::new(error),
        }
    }
}

impl From<RunDirError> for CliError {
    fn from(error: RunDirError) -> Self {
        Self {
            kind: error.kind().to_owned(),
            code: FAILED,
            source: Box::new(error),
        }
    }
}

impl From<SpecError> for CliError {
    fn from(error: SpecError) -> Self {
        Self::new("container_spec", error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_whatever_the_guest_says() {
        let error = CliError::new("x", "a\nb\x1b[2J\n");
        assert_eq!(error.to_string(), "a b [2J");
        let error = CliError::new("x", "disk d: not found (os error 2): give another");
        assert_eq!(error.to_string(), "disk d: not found: give another");
    }

    #[test]
    fn programs_get_dockers_codes() {
        let program = |missing| EngineError::Program {
            command: "x".into(),
            reason: "y".into(),
            missing,
        };
        assert_eq!(CliError::from(program(true)).code, 127);
        assert_eq!(CliError::from(program(false)).code, 126);
        let io = CliError::io("opening x", std::io::ErrorKind::NotFound.into());
        assert_eq!(
            (io.code, io.kind.as_str(), io.chain().len()),
            (125, "io", 0)
        );
    }
}
