//! The few non-virtio devices a Linux guest needs.
