//! Boots a kernel with its console on the terminal: `boot KERNEL [INITRAMFS [CMDLINE [CPUS]]]`.

use std::io;

use bulkhead_vmm::{Console, Vm, VmConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("which kernel?")?.into();
    let initramfs = args.next().filter(|a| !a.is_empty()).map(Into::into);
    let cmdline = args.next().unwrap_or_default();
    let vcpus = args.next().map_or(Ok(1), |n| n.parse())?;
    let vm = Vm::create(VmConfig {
        kernel,
        initramfs,
        cmdline,
        vcpus,
        console: Console::Writer(Box::new(io::stdout())),
        ..VmConfig::default()
    })?;
    vm.start()?;
    let exit = vm.wait();
    let stats = vm.stats();
    eprintln!("{exit}\n{}", serde_json::to_string_pretty(&stats)?);
    Ok(())
}
