//! Users and groups of a container, from its own /etc/passwd and /etc/group.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::paths::{Resolve, open_within};

/// Longest file that is read, in bytes: a container could put anything there.
const MAX_FILE: u64 = 1 << 20;

/// Who a process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Home directory, when the user is known.
    pub home: Option<String>,
}

/// The text of a file below the container's root; empty when there is none.
fn read(root: impl AsFd, path: &str) -> Result<String> {
    // O_NONBLOCK: a FIFO placed there must not hold us.
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    let what = || format!("read {path} of the container");
    let file = match open_within(root, Path::new(path), flags, Resolve::InRoot) {
        Ok(fd) => File::from(fd),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error).context(what),
    };
    if !file.metadata().context(what)?.is_file() {
        return Err(Error::Invalid(format!(
            "{path} of the container is not a regular file"
        )));
    }
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).context(what)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Looks up `user[:group]`, by name or number, below the container's root.
pub fn lookup(root: impl AsFd, wanted: &str) -> Result<User> {
    let passwd = read(root.as_fd(), "etc/passwd")?;
    let group = read(root.as_fd(), "etc/group")?;
    find(&passwd, &group, wanted)
}

/// The home directory of `uid`.
pub fn home(root: impl AsFd, uid: u32) -> Option<String> {
    let passwd = read(root, "etc/passwd").ok()?;
    find(&passwd, "", &uid.to_string()).ok()?.home
}

fn find(passwd: &str, group: &str, wanted: &str) -> Result<User> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (wanted, None),
    };
    // A name that looks like a number is one, unless the file knows it as a name.
    let number = name.parse::<u32>().ok();
    let entry = |by_name: bool| {
        passwd.lines().find_map(|line| {
            let f: Vec<&str> = line.split(':').collect();
            let (n, uid, gid, home) = (f.first()?, f.get(2)?, f.get(3)?, f.get(5));
            let (uid, gid) = (uid.parse::<u32>().ok()?, gid.parse::<u32>().ok()?);
            let hit = if by_name {
                *n == name
            } else {
                Some(uid) == number
            };
            hit.then(|| (n.to_string(), uid, gid, home.map(ToString::to_string)))
        })
    };
    let (login, uid, gid, home) = match entry(true).or_else(|| entry(false)) {
        Some((n, uid, gid, home)) => (Some(n), uid, gid, home),
        None => match number {
            Some(uid) => (None, uid, 0, None),
            None => {
                return Err(Error::Invalid(format!(
                    "user {name:?} is not in the container's /etc/passwd; use a numeric id"
                )));
            }
        },
    };
    let groups = || {
        group.lines().filter_map(|line| {
            let f: Vec<&str> = line.split(':').collect();
            Some((
                f.first()?.to_string(),
                f.get(2)?.parse::<u32>().ok()?,
                f.get(3).map(ToString::to_string).unwrap_or_default(),
            ))
        })
    };
    let home = home.filter(|h| !h.is_empty());
    if let Some(wanted) = group_name {
        // An explicit group replaces the memberships.
        let gid = groups()
            .find(|(n, _, _)| n == wanted)
            .map(|(_, gid, _)| gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "group {wanted:?} is not in the container's /etc/group; use a numeric id"
                ))
            })?;
        return Ok(User {
            uid,
            gid,
            groups: Vec::new(),
            home,
        });
    }
    let groups = match &login {
        None => Vec::new(),
        Some(login) => groups()
            .filter(|(_, g, members)| *g != gid && members.split(',').any(|m| m == login))
            .map(|(_, gid, _)| gid)
            .take(1024)
            .collect(),
    };
    Ok(User {
        uid,
        gid,
        groups,
        home,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:44:w:/var/www:/bin/false\n99:x:5:6::/five:\n";
    const GROUP: &str = "root:x:0:\nwww:x:44:\naudio:x:29:www,other\nvideo:x:44:www\n";

    #[test]
    fn names_and_numbers() {
        let find = |w| find(PASSWD, GROUP, w);
        let www = User {
            uid: 33,
            gid: 44,
            groups: vec![29],
            home: Some("/var/www".into()),
        };
        assert_eq!(find("www").unwrap(), www);
        assert_eq!(find("33").unwrap(), www);
        assert_eq!(find("99").unwrap().uid, 5);
        assert_eq!(find("1234").unwrap().uid, 1234);
        assert_eq!(find("1234").unwrap().gid, 0);
        let g = find("www:audio").unwrap();
        assert_eq!((g.gid, g.groups.len()), (29, 0));
        assert_eq!(find("0:77").unwrap().gid, 77);
        assert!(matches!(find("nobody"), Err(Error::Invalid(_))));
        assert!(matches!(find("www:none"), Err(Error::Invalid(_))));
        assert!(find("").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_files_parse(passwd in ".{0,200}", group in ".{0,200}", who in ".{0,20}") {
            let _ = find(&passwd, &group, &who);
        }
    }

    #[test]
    fn a_fifo_or_link_in_place_of_passwd_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let passwd = dir.path().join("etc/passwd");
        nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let root = File::open(dir.path()).unwrap();
        assert!(matches!(lookup(&root, "0"), Err(Error::Invalid(_))));
        std::fs::remove_file(&passwd).unwrap();
        std::os::unix::fs::symlink("/../../etc/passwd", &passwd).unwrap();
        // The link leads to itself within the root, never to ours.
        assert!(lookup(&root, "0").is_err());
    }
}
