//! As whom a program opens files.
//!
//! The threads of a container take on its user for the file system only (`fsuid`, `fsgid`,
//! supplementary groups) and, unless that is root, give all capabilities up. Their real and
//! effective user stays that of the process on purpose: a process of the host with the container's
//! user number may neither signal nor trace a thread whose other numbers are not its own, and a
//! signal to one thread is one to the whole daemon.

use std::fs;
use std::io;

use caps::CapSet;

/// Supplementary groups the kernel takes (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

/// The user a program's files are opened and made as. Without one, it is that of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// User number.
    pub uid: u32,
    /// Number of the main group.
    pub gid: u32,
    /// Numbers of further groups.
    pub groups: Vec<u32>,
}

impl User {
    /// Makes the calling thread, and those it starts from now on, this user's. There is no way
    /// back.
    ///
    /// # Errors
    /// The process is not root, or has too few capabilities.
    pub(crate) fn adopt(&self) -> io::Result<()> {
        if self.groups.len() > MAX_GROUPS {
            return Err(io::Error::other("too many groups"));
        }
        // By the system call itself: the library's function would change all threads.
        // SAFETY: the pointer is to `len` numbers of 32 bits, which the kernel reads.
        let groups =
            unsafe { libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) };
        if groups != 0 {
            return Err(io::Error::last_os_error());
        }
        // Of this thread only, unlike others of the library's. Both answer with the number before,
        // whether they did it or not.
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(self.gid));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(self.uid));
        if self.uid != 0 {
            for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
                // Of the calling thread.
                caps::clear(None, set).map_err(io::Error::other)?;
            }
        }
        match self.is_current()? {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EPERM)),
        }
    }

    /// Whether the calling thread opens files as this user.
    fn is_current(&self) -> io::Result<bool> {
        let status = fs::read_to_string("/proc/thread-self/status")?;
        // Real, effective, saved, and that of the file system.
        let last = |name: &str| -> Option<u32> {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            line.split_whitespace().nth(3)?.parse().ok()
        };
        Ok((last("Uid:"), last("Gid:")) == (Some(self.uid), Some(self.gid)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_thread_has_files_of_its_user_and_the_others_do_not() {
        let user = User {
            uid: 1234,
            gid: 2345,
            groups: vec![3456],
        };
        let refused = user.clone();
        if !nix::unistd::Uid::effective().is_root() {
            let refused = std::thread::spawn(move || refused.adopt()).join();
            assert!(refused.expect("no panic").is_err());
            return;
        }
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().to_owned();
        let mode = |name: &str, mode| {
            let mode = fs::Permissions::from_mode(mode);
            fs::set_permissions(path.join(name), mode).expect("set");
        };
        mode("", 0o777);
        fs::write(path.join("secret"), "root's").expect("written");
        mode("secret", 0o600);
        fs::write(path.join("group"), "the group's").expect("written");
        mode("group", 0o640);
        std::os::unix::fs::chown(path.join("group"), None, Some(3456)).expect("root");
        let there = path.clone();
        let (secret, group) = std::thread::spawn(move || {
            user.adopt().expect("root may");
            fs::write(there.join("own"), "").expect("anybody may");
            // A thread of the thread, as the runtime makes them.
            std::thread::spawn(move || {
                (
                    fs::read(there.join("secret")),
                    fs::read(there.join("group")),
                )
            })
            .join()
            .expect("no panic")
        })
        .join()
        .expect("no panic");
        assert_eq!(
            secret.expect_err("not readable").kind(),
            io::ErrorKind::PermissionDenied
        );
        assert_eq!(group.expect("readable"), b"the group's");
        let own = fs::metadata(path.join("own")).expect("there");
        assert_eq!((own.uid(), own.gid()), (1234, 2345));
        assert_eq!(fs::read(path.join("secret")).expect("root"), b"root's");
    }
}
