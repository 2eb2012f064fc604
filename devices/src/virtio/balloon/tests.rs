//! The balloon seen by a driver, over memory like that of a VM.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use proptest::proptest;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::device::{F_PAGE_POISON, F_REPORTING, F_STATS_VQ};
use super::io::runs;
use super::*;
use crate::testing::{Guest, MEMORY, READ, WRITE};
use crate::virtio::VirtioDevice;

/// Memory of a memfd, mapped shared; and the file.
fn memfd_guest(queues: usize) -> (Guest, File) {
    // SAFETY: the name is a C string; the result is checked and owned by nobody else.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(MEMORY).unwrap();
    let range = (
        GuestAddress(0),
        MEMORY as usize,
        Some(FileOffset::new(file.try_clone().unwrap(), 0)),
    );
    let mem = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    (Guest::with_memory(queues, 64, mem), file)
}

fn blocks(file: &File) -> i64 {
    // SAFETY: an all-zero stat is a valid one, and the kernel fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the pointer to a stat.
    assert_eq!(unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) }, 0);
    stat.st_blocks * 512
}

fn pfns(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|p| p.to_le_bytes()).collect()
}

#[test]
fn inflating_frees_the_files_pages() {
    let (mut guest, file) = memfd_guest(2);
    for page in 0x20..0x40u64 {
        guest.write(page * 4096, &[7; 4096]);
    }
    let mut balloon = Balloon::new();
    balloon.activate(guest.activation(0)).unwrap();
    // Unsorted, with a page twice, and pages that do not exist.
    guest.write(
        0x1000,
        &pfns(&[0x23, 0x21, 0x22, 0x21, 0x30, 0xffff_ffff, 0x200]),
    );
    guest.add(0, &[(0x1000, 28, READ)]);
    // Touches the used ring, whose page the device would otherwise add to the file.
    assert!(guest.used(0).is_empty());
    let before = blocks(&file);
    balloon.work(0);
    assert_eq!(before - blocks(&file), 4 * 4096);
    assert_eq!(guest.read(0x21000, 4096), [0; 4096]);
    assert_eq!(guest.read(0x24000, 4096), [7; 4096]);
    assert_eq!(guest.read(0x20000, 4096), [7; 4096]);
    assert_eq!(balloon.metrics.released_bytes, 4 * 4096);
    assert_eq!(balloon.metrics.errors, 2);
    assert_eq!(guest.used(0).len(), 1);
    guest.add(1, &[(0x1000, 8, READ)]);
    balloon.work(1);
    assert_eq!(balloon.metrics.deflated_pages, 2);
}

#[test]
fn huge_host_pages_go_back_only_whole() {
    let (mut guest, file) = memfd_guest(2);
    guest.write(0x20000, &[7; 0x10000]);
    // "Huge" pages of 16 KiB show the same.
    let mut balloon = Balloon::with_host_page(0x4000);
    balloon.activate(guest.activation(0)).unwrap();
    guest.write(0x1000, &pfns(&[0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27]));
    guest.add(0, &[(0x1000, 28, READ)]);
    // Touches the used ring, whose page the device would otherwise add to the file.
    assert!(guest.used(0).is_empty());
    let before = blocks(&file);
    balloon.work(0);
    assert_eq!(before - blocks(&file), 0x4000);
    // Which four pages that are depends on where the mapping is; they are neighbours.
    let zero = |page: &u64| guest.read(page * 4096, 1) == [0];
    assert_eq!((0x20..0x30).filter(zero).count(), 4);
}

#[test]
fn reported_pages_are_freed_unless_poisoned() {
    for (features, reporting) in [(F_REPORTING, 2), (F_REPORTING | F_STATS_VQ, 3)] {
        let (mut guest, _file) = memfd_guest(4);
        guest.write(0x40000, &[7; 0x8000]);
        let mut balloon = Balloon::new();
        balloon
            .activate(guest.activation(features | F_PAGE_POISON))
            .unwrap();
        guest.add(
            reporting,
            &[(0x40000, 0x2000, WRITE), (0x44000, 0x1000, WRITE)],
        );
        balloon.work(reporting);
        assert_eq!(balloon.metrics.released_bytes, 0x3000);
        assert_eq!(guest.read(0x40000, 0x2000), [0; 0x2000]);
        assert_eq!(guest.read(0x42000, 0x2000), [7; 0x2000]);
        balloon.write_config(12, &0xaaaa_aaaa_u32.to_le_bytes());
        guest.add(reporting, &[(0x42000, 0x2000, WRITE)]);
        balloon.work(reporting);
        assert_eq!(guest.read(0x42000, 0x2000), [7; 0x2000]);
        assert_eq!(guest.used(reporting).len(), 2);
    }
}

#[test]
fn private_memory_is_dropped_instead() {
    let mut guest = Guest::new(2, 16);
    guest.write(0x20000, &[7; 4096]);
    let mut balloon = Balloon::new();
    balloon.activate(guest.activation(0)).unwrap();
    guest.write(0x1000, &pfns(&[0x20]));
    guest.add(0, &[(0x1000, 4, READ)]);
    balloon.work(0);
    assert_eq!(guest.read(0x20000, 4096), [0; 4096]);
    assert_eq!(balloon.metrics.released_bytes, 4096);
}

#[test]
fn target_and_actual() {
    let guest = Guest::new(2, 16);
    let mut balloon = Balloon::new();
    balloon.activate(guest.activation(0)).unwrap();
    balloon.set_target(0x1234);
    assert_eq!(guest.interrupt.status(), 2);
    let mut config = [0xff; 8];
    balloon.read_config(0, &mut config);
    assert_eq!(config, [0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    balloon.write_config(4, &[0x21, 0, 0, 0]);
    balloon.write_config(0, &[1, 0, 0, 0]);
    assert_eq!((balloon.target(), balloon.actual()), (0x1234, 0x21));
}

#[test]
fn statistics_are_kept_until_asked_for() {
    let mut guest = Guest::new(3, 16);
    let mut balloon = Balloon::new();
    balloon.activate(guest.activation(F_STATS_VQ)).unwrap();
    assert!(!balloon.request_stats());
    let mut put = |tag: u16, value: u64, at: u64| {
        guest.write(at, &tag.to_le_bytes());
        guest.write(at + 2, &value.to_le_bytes());
    };
    put(4, 1111, 0x1000);
    put(99, 1, 0x100a);
    put(5, 2222, 0x1014);
    guest.add(2, &[(0x1000, 30, READ)]);
    balloon.work(2);
    assert_eq!((balloon.stats().free, balloon.stats().total), (1111, 2222));
    assert!(guest.used(2).is_empty(), "kept");
    // It survives being saved.
    let state = balloon.save();
    let mut other = Balloon::new();
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    assert_eq!(other.stats(), balloon.stats());
    assert!(balloon.request_stats());
    assert!(!balloon.request_stats());
    assert_eq!(guest.used(2).len(), 1);
    // Buffers nobody asked for go back one by one.
    guest.add(2, &[(0x1000, 30, READ)]);
    guest.add(2, &[(0x1000, 30, READ)]);
    balloon.work(2);
    assert_eq!(guest.used(2).len(), 2);
    assert!(Balloon::new().restore(&serde_json::json!({})).is_err());
}

#[test]
fn runs_of_pages() {
    let mut seen = Vec::new();
    runs(&mut vec![5, 1, 2, 2, u32::MAX, 3], |a, l| {
        seen.push((a.0, l))
    });
    let top = u64::from(u32::MAX) * 4096;
    assert_eq!(seen, [(0x1000, 0x3000), (0x5000, 0x1000), (top, 0x1000)]);
}

proptest! {
    #[test]
    fn hostile_rings(noise in crate::testing::noise()) {
        let mut guest = Guest::new(4, 16);
        let mut balloon = Balloon::new();
        balloon.activate(guest.activation(F_STATS_VQ | F_REPORTING)).unwrap();
        guest.scribble(&noise);
        for round in 0..16 {
            balloon.work(round % 4);
        }
    }
}
