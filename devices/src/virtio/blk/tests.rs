//! The block device seen by a driver.

use std::io::Write;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::device::F_FLUSH;
use super::*;
use crate::testing::{Guest, READ, WRITE};
use crate::virtio::VirtioDevice;

const SECTORS: u64 = 64;
const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x2000;
const DATA: u64 = 0x4000;

struct Setup {
    guest: Guest,
    blk: Blk,
    image: NamedTempFile,
    done: usize,
}

fn image() -> NamedTempFile {
    let mut image = NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..SECTORS * 512).map(|n| (n / 512) as u8 + 1).collect();
    image.write_all(&data).unwrap();
    image
}

fn setup(read_only: bool) -> Setup {
    let image = image();
    let disk = Disk::open(image.path(), read_only, "serial-0123456789-and-more").unwrap();
    let guest = Guest::new(1, 64);
    let mut blk = Blk::new(disk);
    blk.activate(guest.activation(F_FLUSH)).unwrap();
    Setup {
        guest,
        blk,
        image,
        done: 0,
    }
}

impl Setup {
    /// One request; (status, used length).
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.write(HEADER, &header);
        self.guest.write(STATUS, &[0xff]);
        let mut chain = vec![(HEADER, 16, READ)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, WRITE));
        self.guest.add(0, &chain);
        self.blk.work();
        let used = self.guest.used(0);
        self.done += 1;
        assert_eq!(used.len(), self.done);
        (self.guest.read(STATUS, 1)[0], used[self.done - 1].1)
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.guest.write(DATA, &range);
        self.request(kind, 0, &[(DATA, 16, READ)]).0
    }

    fn on_disk(&self, sector: u64) -> u8 {
        let mut byte = [0xee];
        self.image
            .as_file()
            .read_exact_at(&mut byte, sector * 512)
            .unwrap();
        byte[0]
    }
}

#[test]
fn reads_and_writes_in_many_pieces() {
    let mut s = setup(false);
    let pieces = [
        (DATA, 100, WRITE),
        (DATA + 0x800, 412, WRITE),
        (DATA + 0x1000, 512, WRITE),
    ];
    assert_eq!(s.request(0, 3, &pieces), (0, 1025));
    assert_eq!(s.guest.read(DATA, 100), [4; 100]);
    assert_eq!(s.guest.read(DATA + 100, 1), [0]);
    assert_eq!(s.guest.read(DATA + 0x800, 412), [4; 412]);
    assert_eq!(s.guest.read(DATA + 0x1000, 512), [5; 512]);
    s.guest.write(DATA, &[0xaa; 512]);
    assert_eq!(
        s.request(1, 10, &[(DATA, 500, READ), (DATA, 12, READ)]),
        (0, 1)
    );
    assert_eq!((s.on_disk(10), s.on_disk(11)), (0xaa, 12));
    assert_eq!(s.request(4, 0, &[]), (0, 1));
    assert_eq!(
        (s.blk.metrics.read_bytes, s.blk.metrics.write_bytes),
        (1024, 512)
    );
    assert_eq!(s.guest.interrupt.status(), 1);
}

#[test]
fn a_request_may_be_laid_out_in_any_way() {
    let mut s = setup(false);
    // Header in two parts, data and status in one buffer.
    let mut header = [0; 16];
    header[8] = 7;
    s.guest.write(HEADER, &header);
    s.guest.add(
        0,
        &[
            (HEADER, 3, READ),
            (HEADER + 3, 13, READ),
            (DATA, 513, WRITE),
        ],
    );
    s.blk.work();
    assert_eq!(s.guest.used(0)[0].1, 513);
    assert_eq!(s.guest.read(DATA, 512), [8; 512]);
    assert_eq!(s.guest.read(DATA + 512, 1), [0]);
}

#[test]
fn requests_of_one_turn_are_all_answered_each_as_it_deserves() {
    let image = image();
    let disk = Disk::open(image.path(), false, "").unwrap();
    let mut guest = Guest::new(1, 256);
    let mut blk = Blk::new(disk);
    blk.activate(guest.activation(F_FLUSH)).unwrap();
    // Twenty reads of a sector each, a write, a read past the end, a flush, an unknown request.
    let mut wanted = Vec::new();
    let mut add = |n: u64, kind: u32, sector: u64, data: &[(u64, u32, u16)], answer: (u8, u32)| {
        let header_at = HEADER + n * 16;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        guest.write(header_at, &header);
        let mut chain = vec![(header_at, 16, READ)];
        chain.extend_from_slice(data);
        chain.push((STATUS + n, 1, WRITE));
        let head = guest.add(0, &chain);
        wanted.push((u32::from(head), STATUS + n, answer));
    };
    for n in 0..20 {
        add(n, 0, n, &[(DATA + n * 512, 512, WRITE)], (0, 513));
    }
    add(20, 1, 40, &[(HEADER, 512, READ)], (0, 1));
    add(21, 0, SECTORS, &[(DATA + 0x4000, 512, WRITE)], (1, 1));
    add(22, 4, 0, &[], (0, 1));
    add(23, 77, 0, &[], (2, 1));
    blk.work();
    let used = guest.used(0);
    assert_eq!(used.len(), wanted.len());
    for (head, status_at, (status, len)) in wanted {
        assert!(used.contains(&(head, len)), "{head}: {used:?}");
        assert_eq!(guest.read(status_at, 1), [status]);
    }
    for n in 0..20 {
        assert_eq!(guest.read(DATA + n * 512, 512), [n as u8 + 1; 512]);
    }
    let mut written = [0; 512];
    image
        .as_file()
        .read_exact_at(&mut written, 40 * 512)
        .unwrap();
    assert_eq!(written.as_slice(), guest.read(HEADER, 512));
    assert_eq!((blk.metrics.reads, blk.metrics.writes), (20, 1));
    // Together, where the host's kernel lets us.
    let together = io_uring::IoUring::new(1).is_ok();
    assert_eq!(blk.metrics.by_io_uring, if together { 21 } else { 0 });
    // The disk is shorter than it was: those past its end fail, the others do not.
    image.as_file().set_len(512).unwrap();
    for n in 0..2u64 {
        let mut header = [0; 16];
        header[8..].copy_from_slice(&n.to_le_bytes());
        guest.write(HEADER + n * 16, &header);
        let chain = [
            (HEADER + n * 16, 16, READ),
            (DATA, 512, WRITE),
            (STATUS + n, 1, WRITE),
        ];
        guest.add(0, &chain);
    }
    blk.work();
    assert_eq!(guest.read(STATUS, 2), [0, 1]);
}

#[test]
fn bounds_and_nonsense() {
    let mut s = setup(false);
    assert_eq!(s.request(0, SECTORS - 1, &[(DATA, 512, WRITE)]).0, 0);
    for sector in [SECTORS, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(s.request(0, sector, &[(DATA, 512, WRITE)]).0, 1, "{sector}");
        assert_eq!(s.request(1, sector, &[(DATA, 512, READ)]).0, 1, "{sector}");
    }
    assert_eq!(
        s.request(0, 0, &[(DATA, 511, WRITE)]).0,
        1,
        "not whole sectors"
    );
    assert_eq!(s.request(0, SECTORS - 1, &[(DATA, 1024, WRITE)]).0, 1);
    assert_eq!(s.request(99, 0, &[]).0, 2);
    assert_eq!(
        s.request(8, 0, &[(DATA, 10, WRITE)]).0,
        1,
        "id does not fit"
    );
    // Without a status byte, and without a header.
    s.guest.add(0, &[(HEADER, 16, READ)]);
    s.guest.add(0, &[(HEADER, 3, READ), (STATUS, 1, WRITE)]);
    s.blk.work();
    assert_eq!(s.guest.used(0)[s.done].1, 0);
    assert_eq!(s.guest.used(0)[s.done + 1].1, 1);
    assert!(!s.guest.interrupt.needs_reset());
}

#[test]
fn a_file_that_shrinks_is_an_error_not_an_end() {
    let mut s = setup(false);
    s.image.as_file().set_len(1024).unwrap();
    assert_eq!(s.request(0, 10, &[(DATA, 512, WRITE)]).0, 1);
    assert_eq!(s.request(0, 1, &[(DATA, 512, WRITE)]).0, 0);
}

#[test]
fn identity_discard_and_zeroes() {
    let mut s = setup(false);
    assert_eq!(s.request(8, 0, &[(DATA, 20, WRITE)]), (0, 21));
    assert_eq!(s.guest.read(DATA, 20), b"serial-0123456789-an");
    assert_eq!(s.range(11, 0, 8, 0), 0);
    assert_eq!((s.on_disk(0), s.on_disk(8)), (0, 9));
    assert_eq!(s.range(13, 16, 8, 0), 0);
    assert_eq!(s.range(13, 32, 8, 1), 0);
    assert_eq!((s.on_disk(15), s.on_disk(16), s.on_disk(24)), (16, 0, 25));
    assert_eq!((s.on_disk(32), s.on_disk(40)), (0, 41));
    assert_eq!(s.range(11, 0, 8, 1), 2, "a discard knows no flags");
    assert_eq!(s.range(13, 0, 8, 2), 2);
    assert_eq!(s.range(11, SECTORS - 1, 2, 0), 1);
    assert_eq!(s.range(13, 0, u32::MAX, 0), 1);
    assert_eq!(s.image.as_file().metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn read_only_means_it() {
    let mut s = setup(true);
    assert_eq!(s.blk.features() & 1 << 5, 1 << 5);
    assert_eq!(s.request(0, 0, &[(DATA, 512, WRITE)]).0, 0);
    assert_eq!(s.request(1, 0, &[(DATA, 512, READ)]).0, 1);
    assert_eq!(s.range(11, 0, 8, 0), 1);
    assert_eq!(s.range(13, 0, 8, 0), 1);
    assert_eq!(s.request(4, 0, &[]).0, 0);
    assert_eq!(s.on_disk(0), 1);
}

#[test]
fn a_spare_slot_is_filled_later() {
    let guest = Guest::new(1, 64);
    let mut blk = Blk::spare();
    blk.activate(guest.activation(F_FLUSH)).unwrap();
    let capacity = |blk: &Blk| {
        let mut data = [0xff; 8];
        blk.read_config(0, &mut data);
        u64::from_le_bytes(data)
    };
    assert_eq!(capacity(&blk), 0);
    let mut s = Setup {
        guest,
        blk,
        image: image(),
        done: 0,
    };
    assert_eq!(s.request(0, 0, &[(DATA, 512, WRITE)]).0, 1);
    let disk = Disk::open(s.image.path(), false, "late").unwrap();
    let generation = s.guest.interrupt.config_generation();
    s.blk.attach(disk).unwrap();
    assert_eq!(capacity(&s.blk), SECTORS);
    assert_eq!(s.guest.interrupt.status() & 2, 2);
    assert_ne!(s.guest.interrupt.config_generation(), generation);
    assert_eq!(s.request(0, 0, &[(DATA, 512, WRITE)]).0, 0);
    let other = image();
    let refused = s.blk.attach(Disk::open(other.path(), true, "").unwrap());
    assert!(refused.is_err());
    // Its state fits a slot that has the same disk again.
    let state = s.blk.save();
    drop(s.blk.detach());
    assert_eq!(capacity(&s.blk), 0);
    assert!(Blk::spare().restore(&state).is_err());
    let disk = Disk::open(s.image.path(), true, "late").unwrap();
    let mut again = Blk::new(disk);
    again.restore(&state).unwrap();
    assert_eq!(again.save(), state);
    assert!(again.restore(&serde_json::json!({ "version": 2 })).is_err());
}

#[test]
fn disks_are_checked_and_locked() {
    let image = image();
    let writer = Disk::open(image.path(), false, "").unwrap();
    let error = Disk::open(image.path(), false, "").unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(Disk::open(image.path(), true, "").is_err());
    drop(writer);
    let _one = Disk::open(image.path(), true, "").unwrap();
    let _two = Disk::open(image.path(), true, "").unwrap();
    assert!(matches!(
        Disk::open(std::path::Path::new("/"), true, ""),
        Err(DiskError::Kind(_))
    ));
    assert!(matches!(
        Disk::open(std::path::Path::new("/nonexistent"), true, ""),
        Err(DiskError::Host { .. })
    ));
}

#[test]
fn files_in_a_row_are_one_disk_with_gaps() {
    let (one, two) = (image(), image());
    two.as_file().write_all_at(&[0xcc; 512], 0).unwrap();
    let length = SECTORS * 512;
    let starts = joined_layout(&[length, length]).unwrap();
    assert_eq!(starts[0], 0);
    assert!(starts[1] > length && starts[1].is_multiple_of(1 << 20));
    let files = || [&one, &two].map(|f| f.reopen().unwrap()).into();
    let path = std::path::Path::new("layers");
    let mut guest = Guest::new(1, 64);
    let _ = &mut guest;
    let mut blk = Blk::spare();
    blk.activate(guest.activation(F_FLUSH)).unwrap();
    blk.attach(Disk::joined(files(), path, "row").unwrap())
        .unwrap();
    let mut s = Setup {
        guest,
        blk,
        image: image(),
        done: 0,
    };
    let second = starts[1] / 512;
    assert_eq!(s.request(0, 3, &[(DATA, 512, WRITE)]).0, 0);
    assert_eq!(s.guest.read(DATA, 1), [4]);
    assert_eq!(s.request(0, second, &[(DATA, 1024, WRITE)]).0, 0);
    assert_eq!(s.guest.read(DATA, 512), [0xcc; 512]);
    assert_eq!(s.guest.read(DATA + 512, 512), [2; 512]);
    // Neither over an end, nor in the gap, nor behind the last; and nothing is written.
    for sector in [SECTORS - 1, SECTORS, second - 1, second + SECTORS - 1] {
        assert_eq!(
            s.request(0, sector, &[(DATA, 1024, WRITE)]).0,
            1,
            "{sector}"
        );
    }
    assert_eq!(s.request(1, 0, &[(DATA, 512, READ)]).0, 1);
    assert_eq!(s.request(11, 0, &[(DATA, 16, READ)]).0, 1);
    assert_eq!(s.request(4, 0, &[]).0, 0);
    assert_eq!(s.request(8, 0, &[(DATA, 20, WRITE)]).0, 0);
    assert_eq!(s.guest.read(DATA, 3), b"row");

    assert!(Disk::joined(Vec::new(), path, "").is_err());
    one.as_file().set_len(length + 1).unwrap();
    assert!(Disk::joined(files(), path, "").is_err());
    for bad in [
        vec![],
        vec![0],
        vec![100],
        vec![u64::MAX - 511, 512],
        vec![512; MAX_PARTS + 1],
    ] {
        assert_eq!(joined_layout(&bad), None);
    }
}

proptest! {
    #[test]
    fn parts_never_touch(lengths in proptest::collection::vec(1u64..1 << 30, 1..MAX_PARTS)) {
        let lengths: Vec<u64> = lengths.into_iter().map(|n| n * 512).collect();
        let starts = joined_layout(&lengths).unwrap();
        for (n, pair) in starts.windows(2).enumerate() {
            prop_assert!(pair[1] > pair[0] + lengths[n]);
        }
    }

    #[test]
    fn hostile_rings(noise in crate::testing::noise()) {
        let mut s = setup(false);
        s.guest.scribble(&noise);
        for _ in 0..4 {
            s.blk.work();
        }
        prop_assert_eq!(s.image.as_file().metadata().unwrap().len(), SECTORS * 512);
    }
}
