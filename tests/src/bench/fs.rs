//! virtio-fs beside QEMU with virtiofsd: sequential read, and `find` over 20,000 files.
