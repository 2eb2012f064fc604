//! What a snapshot keeps of a share: which files the guest knows, by name, and which it has open.
//! Files it had removed but still held are gone after a restore (`ESTALE`).

use std::ffi::CString;

use serde::{Deserialize, Serialize};

use super::share::Share;
use super::tree::ROOT;
use crate::virtio::StateError;

const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNode {
    id: u64,
    parent: u64,
    /// The name's bytes as code points 0 to 255, as names need not be UTF-8.
    name: String,
    kind: u32,
    lookups: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedHandle {
    id: u64,
    node: u64,
    flags: i32,
}

/// Saved state of a share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    tag: String,
    writeback: bool,
    kill_priv: bool,
    next_node: u64,
    next_handle: u64,
    nodes: Vec<SavedNode>,
    handles: Vec<SavedHandle>,
}

fn error(reason: impl Into<String>) -> StateError {
    StateError {
        device: "fs",
        reason: reason.into(),
    }
}

impl State {
    pub(super) fn save(tag: &str, share: &Share) -> Self {
        let inner = share.inner();
        let mut nodes: Vec<_> = inner
            .tree
            .iter()
            .filter(|(id, node)| **id != ROOT && !node.detached)
            .map(|(id, node)| SavedNode {
                id: *id,
                parent: node.parent,
                name: node
                    .name
                    .to_bytes()
                    .iter()
                    .copied()
                    .map(char::from)
                    .collect(),
                kind: node.kind,
                lookups: node.lookups,
            })
            .collect();
        nodes.sort_unstable_by_key(|node| node.id);
        let mut handles: Vec<_> = inner
            .handles
            .iter()
            .map(|(id, handle)| SavedHandle {
                id: *id,
                node: handle.node,
                flags: handle.flags,
            })
            .collect();
        handles.sort_unstable_by_key(|handle| handle.id);
        Self {
            version: VERSION,
            tag: tag.to_owned(),
            writeback: inner.writeback,
            kill_priv: inner.kill_priv,
            next_node: inner.tree.next_id(),
            next_handle: inner.next_handle,
            nodes,
            handles,
        }
    }

    pub(super) fn restore(
        value: &serde_json::Value,
        tag: &str,
        share: &Share,
    ) -> Result<(), StateError> {
        let state: Self =
            serde_json::from_value(value.clone()).map_err(|e| error(e.to_string()))?;
        if state.version != VERSION {
            return Err(error(format!(
                "version {} was saved, this build knows {VERSION}",
                state.version
            )));
        }
        if state.tag != tag {
            return Err(error(format!(
                "it is of the share {:?}, this is {tag:?}",
                state.tag
            )));
        }
        share.clear();
        let mut inner = share.inner();
        if state.nodes.len() >= inner.tree.limits.nodes
            || state.handles.len() > inner.tree.limits.handles
        {
            return Err(error("it has more files than the share's limits allow"));
        }
        inner.writeback = state.writeback;
        inner.kill_priv = state.kill_priv;
        for node in state.nodes {
            let bytes: Option<Vec<u8>> = node
                .name
                .chars()
                .map(|c| u8::try_from(u32::from(c)).ok())
                .collect();
            let name = bytes
                .filter(|name| {
                    !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b".."
                })
                .and_then(|name| CString::new(name).ok())
                .ok_or_else(|| error(format!("node {} has an impossible name", node.id)))?;
            inner
                .tree
                .insert_saved(node.id, node.parent, name, node.kind, node.lookups);
        }
        inner.tree.settle_saved(state.next_node);
        let mut lost = 0;
        for handle in state.handles {
            let flags = if share.read_only {
                handle.flags & !libc::O_ACCMODE
            } else {
                handle.flags
            };
            if share
                .restore_handle(&mut inner, handle.id, handle.node, flags)
                .is_err()
            {
                lost += 1;
            }
        }
        inner.next_handle = inner.next_handle.max(state.next_handle);
        if lost > 0 {
            log::warn!("fs: {lost} files the guest had open are gone; it gets EBADF for them");
        }
        Ok(())
    }
}
