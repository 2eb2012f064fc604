//! Passes the app kernel's linker script; only for the bare machine.
fn main() {
    println!("cargo:rerun-if-changed=../../appkernel/kernel/linker.ld");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo:rustc-link-arg-bins=-T{dir}/../../appkernel/kernel/linker.ld");
        println!("cargo:rustc-link-arg-bins=--no-pie");
    }
}
