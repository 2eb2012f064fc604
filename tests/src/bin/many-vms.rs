//! `many-vms COUNT KERNEL INITRAMFS`: that many VMs in one process which holds nothing else, for
//! `bench boot` to measure. Ends with its standard input.

use anyhow::{Context, Result};
use bulkhead_tests::bench::boot::many;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "many-vms COUNT KERNEL INITRAMFS";
    let count = args.next().context(usage)?.parse()?;
    let kernel = args.next().context(usage)?;
    let initramfs = args.next().context(usage)?;
    many(count, kernel.as_ref(), initramfs.as_ref())
}
