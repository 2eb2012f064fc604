//! An address space that dispatches guest accesses to devices.

use std::sync::Arc;

use bulkhead_devices::bus::BusDevice;

/// Devices by address range. Built once before the vCPUs run, then read without a lock.
#[derive(Default)]
pub(crate) struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    start: u64,
    len: u64,
    name: String,
    device: Arc<dyn BusDevice>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.ranges.iter().map(|r| (&r.name, r.start, r.len)))
            .finish()
    }
}

impl Bus {
    /// Adds a device at `start`. Ranges are laid out by us, never by the guest, and do not overlap.
    pub(crate) fn insert(
        &mut self,
        start: u64,
        len: u64,
        name: impl Into<String>,
        device: Arc<dyn BusDevice>,
    ) {
        let at = self.ranges.partition_point(|r| r.start < start);
        debug_assert!(at == 0 || self.ranges[at - 1].start + self.ranges[at - 1].len <= start);
        self.ranges.insert(
            at,
            Range {
                start,
                len,
                name: name.into(),
                device,
            },
        );
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|r| r.start <= address);
        let range = self.ranges.get(at.checked_sub(1)?)?;
        let offset = address - range.start;
        (offset < range.len).then(|| (range.device.as_ref(), offset))
    }

    /// Reads; where nothing answers the bus floats high, as on a PC.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xFF),
        }
    }

    /// Writes; where nothing answers the data is lost.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    /// (name, start, length) of every device.
    pub(crate) fn map(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.ranges
            .iter()
            .map(|r| (r.name.as_str(), r.start, r.len))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);
    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn finds_the_device_and_floats_elsewhere() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder(Mutex::new(Vec::new())));
        bus.insert(0x2000, 0x100, "b", device.clone());
        bus.insert(0x1000, 0x100, "a", device.clone());
        let mut byte = [0];
        bus.read(0x1042, &mut byte);
        assert_eq!(byte, [0x42]);
        for hole in [0, 0xFFF, 0x1100, 0x2100, u64::MAX] {
            bus.read(hole, &mut byte);
            assert_eq!(byte, [0xFF]);
            bus.write(hole, &[1]);
        }
        assert!(device.0.lock().unwrap().is_empty());
        bus.write(0x20FF, &[7]);
        assert_eq!(device.0.lock().unwrap()[0], (0xFF, vec![7]));
    }
}
