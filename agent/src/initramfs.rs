//! First steps in an initramfs: a distribution's kernel has its drivers as modules.
//!
//! `rootfs/initramfs` packs this program as `/init`, and modules with `/modules/order`. As soon as
//! they are loaded, the guest image takes the place of the initramfs and its agent starts anew.

use std::ffi::CString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};

/// Names of the modules' files, one a line, in the order of their dependencies.
const ORDER: &str = "/modules/order";
const DISK: &str = "/dev/vda";
const ROOT: &str = "/mnt";
/// The disk appears while its module is loaded; a slow host may take longer.
const PATIENCE: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(10);

/// Whether this is such an initramfs.
pub fn is_here() -> bool {
    Path::new(ORDER).exists()
}

/// Loads the modules and becomes the agent of the guest image. Returns only what went wrong.
pub fn enter_image() -> String {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc")] {
        let _ = fs::create_dir_all(target);
        match mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        ) {
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => return format!("mount {kind} on {target}: {errno}"),
        }
    }
    crate::log::use_kmsg();
    let order = match fs::read_to_string(ORDER) {
        Ok(order) => order,
        Err(error) => return format!("{ORDER}: {error}"),
    };
    for name in order.lines() {
        // What a kernel does without may be what this guest does not need: the mount tells.
        if let Err(error) = load(name) {
            crate::warning!("module {name}: {error}");
        }
    }
    // No notification exists without a daemon for it: the node is looked for.
    let mut waited = Duration::ZERO;
    while !Path::new(DISK).exists() {
        if waited >= PATIENCE {
            return format!(
                "no {DISK}: the initramfs lacks a driver of this kernel for virtio-mmio or virtio-blk"
            );
        }
        std::thread::sleep(STEP);
        waited += STEP;
    }
    let image = mount(
        Some(DISK),
        ROOT,
        Some("erofs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    );
    if let Err(errno) = image {
        return format!("mount {DISK}, the guest image, as erofs: {errno}");
    }
    // Memory of the initramfs goes back to the guest.
    for name in order.lines() {
        let _ = fs::remove_file(Path::new("/modules").join(name));
    }
    let _ = fs::remove_file(ORDER);
    let _ = fs::remove_file("/init");
    let moved = std::env::set_current_dir(ROOT)
        .map_err(|e| e.to_string())
        .and_then(|()| {
            mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
                .map_err(|e| e.to_string())
        })
        .and_then(|()| nix::unistd::chroot(".").map_err(|e| e.to_string()))
        .and_then(|()| std::env::set_current_dir("/").map_err(|e| e.to_string()));
    if let Err(error) = moved {
        return format!("make the guest image the root: {error}");
    }
    let error = Command::new("/sbin/agent").exec();
    format!("/sbin/agent of the guest image: {error}")
}

fn load(name: &str) -> Result<(), String> {
    let file = fs::File::open(Path::new("/modules").join(name)).map_err(|e| e.to_string())?;
    let options = CString::default();
    match nix::kmod::finit_module(&file, &options, nix::kmod::ModuleInitFlags::empty()) {
        // Built in, or loaded already.
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.to_string()),
    }
}
