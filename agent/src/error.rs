//! What can go wrong in the agent, and the codes it is answered with.

use bulkhead_protocol::rpc::{Code, Status};

/// An error of the agent. Messages name the object, the cause and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container, process or stream.
    #[error("{0}")]
    NotFound(String),
    /// There is one already.
    #[error("{0}")]
    Exists(String),
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Not now.
    #[error("{0}")]
    State(String),
    /// Too many or too large.
    #[error("{0}")]
    Limit(String),
    /// Not something this guest can do.
    #[error("{0}")]
    Unsupported(String),
    /// The kernel refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A helper process reported this.
    #[error("{message}")]
    Helper {
        /// Its code.
        code: Code,
        /// Its message.
        message: String,
    },
}

/// A result of the agent.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The code it is answered with.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::Exists(_) => Code::AlreadyExists,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::State(_) => Code::FailedPrecondition,
            Self::Limit(_) => Code::ResourceExhausted,
            Self::Unsupported(_) => Code::Unimplemented,
            Self::Io { .. } => Code::Internal,
            Self::Helper { code, .. } => *code,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code(), error.to_string())
    }
}

/// Adds what was attempted to an error of the kernel.
pub trait Context<T> {
    /// `what` failed.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what(),
            source,
        })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::Io {
            what: what(),
            source: errno.into(),
        })
    }
}
