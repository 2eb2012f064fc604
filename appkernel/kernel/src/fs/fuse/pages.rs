//! The content of files: its pages, which are a cache and may be mapped.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::{Body, OUT_HEADER, Op, Reader};
use appkernel_hal::{PAGE, frames, usercopy};

use super::super::virtio::ANSWER_MAX;
use super::{KEPT_HANDLES, Node, READ_CHUNK, WRITE_CHUNK};
use crate::task;

impl Node {
    fn read_handle(&self, handle: u64, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let len = len.min(ANSWER_MAX - OUT_HEADER);
        let body = Body::new()
            .u64(handle)
            .u64(offset)
            .u32(len as u32)
            .u32(0)
            .u64(0)
            .u32(0)
            .u32(0);
        self.fuse()?
            .call(Op::Read, self.id, &body.0, &[], len, |answer| {
                Ok(answer.to_vec())
            })
    }

    /// The frame of a page of the file (the cache owns it); `EFAULT` past the end.
    pub fn page(&self, index: u64) -> Result<u64, Errno> {
        let size = {
            let state = self.state.lock();
            if let Some(frame) = state.pages.get(&index) {
                return Ok(*frame);
            }
            state.attributes.size
        };
        if index >= size.div_ceil(PAGE) {
            return Err(Errno::EFAULT);
        }
        let kept = self.state.lock().handle;
        let handle = match kept {
            Some(handle) => handle,
            None => self.open_handle(Op::Open, 0)?,
        };
        let fuse = self.fuse()?;
        if kept.is_none() {
            let mut handles = fuse.handles.lock();
            if *handles < KEPT_HANDLES {
                *handles += 1;
                self.state.lock().handle = Some(handle);
            }
        }
        let first = index * PAGE / READ_CHUNK * READ_CHUNK;
        let result = self.read_handle(handle, first, READ_CHUNK as usize);
        if self.state.lock().handle.is_none() {
            self.release_handle(Op::Release, handle);
        }
        let bytes = result?;
        let wanted = index - first / PAGE;
        let mut chunks: Vec<&[u8]> = bytes.chunks(PAGE as usize).collect();
        while chunks.len() as u64 <= wanted {
            // Shorter than it was: zeros, as a file that is cut while it is mapped shows.
            chunks.push(&[]);
        }
        for (i, chunk) in chunks.iter().enumerate() {
            let number = first / PAGE + i as u64;
            if self.state.lock().pages.contains_key(&number) {
                continue;
            }
            let frame = match frames::allocate_user_unwritten() {
                Some(frame) => frame,
                None if number == index && fuse.shrink() > 0 => {
                    frames::allocate_user_unwritten().ok_or(Errno::ENOMEM)?
                }
                None if number == index => return Err(Errno::ENOMEM),
                None => continue,
            };
            // SAFETY: a new frame, and nobody has another reference to it.
            let to = unsafe { frames::bytes(frame) };
            let (filled, rest) = to.split_at_mut(chunk.len().min(PAGE as usize));
            filled.copy_from_slice(chunk.get(..filled.len()).unwrap_or_default());
            rest.fill(0);
            self.state.lock().pages.insert(number, frame);
        }
        self.state
            .lock()
            .pages
            .get(&index)
            .copied()
            .ok_or(Errno::EIO)
    }

    /// Reads from the file, through the cache; returns how many bytes there were.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<usize, Errno> {
        let size = self.attributes()?.size;
        let end = size.min(offset.saturating_add(to.len() as u64));
        let mut at = offset;
        while at < end {
            let frame = self.page(at / PAGE)?;
            let inside = (at % PAGE) as usize;
            let len = (PAGE as usize - inside).min((end - at) as usize);
            // SAFETY: the cache owns the frame, and it is not freed before the next request.
            let bytes = unsafe { frames::bytes(frame) };
            let done = (at - offset) as usize;
            if let (Some(to), Some(from)) = (
                to.get_mut(done..done + len),
                bytes.get(inside..inside + len),
            ) {
                to.copy_from_slice(from);
            }
            at += len as u64;
        }
        Ok(end.saturating_sub(offset) as usize)
    }

    /// Reads from the file into a program's memory, from the cache as it lies there; returns how
    /// many bytes there were.
    ///
    /// # Errors
    /// `EFAULT` if not one byte can be written there, or why the file cannot be read.
    pub fn read_to_program(&self, offset: u64, address: u64, count: u64) -> Result<u64, Errno> {
        let size = self.attributes()?.size;
        let end = size.min(offset.saturating_add(count));
        let mut at = offset;
        while at < end {
            let inside = (at % PAGE) as usize;
            let len = (PAGE as usize - inside).min((end - at) as usize);
            let copied = self.page(at / PAGE).and_then(|frame| {
                // The copy may need memory, and the cache give some away: not this page.
                frames::share(frame);
                let to = address.wrapping_add(at - offset);
                let result = usercopy::write_frame(to, frame, inside, len);
                frames::release(frame, 0);
                result.map_err(|_| Errno::EFAULT)
            });
            match copied {
                Ok(()) => at += len as u64,
                Err(e) if at == offset => return Err(e),
                Err(_) => break,
            }
            if at.is_multiple_of(READ_CHUNK) && task::breathe().is_err() {
                break;
            }
        }
        Ok(at.saturating_sub(offset))
    }

    /// Calls `f` with those pages of the file that are in the cache, from `first` to before `end`.
    pub fn cached_pages(&self, first: u64, end: u64, mut f: impl FnMut(u64, u64)) {
        let state = self.state.lock();
        for (index, frame) in state.pages.range(first..end) {
            f(*index, *frame);
        }
    }

    /// Writes to the file, at once to the host; returns how many bytes it took.
    pub fn write(&self, handle: u64, offset: u64, from: &[u8]) -> Result<usize, Errno> {
        let from = from.get(..WRITE_CHUNK.min(from.len())).unwrap_or_default();
        let body = Body::new()
            .u64(handle)
            .u64(offset)
            .u32(from.len() as u32)
            .u32(0)
            .u64(0)
            .u32(0)
            .u32(0);
        let count = self
            .fuse()?
            .call(Op::Write, self.id, &body.0, from, 8, |a| Reader(a).u32())?;
        let count = (count as usize).min(from.len());
        let mut state = self.state.lock();
        // Pages in the cache are changed in place: they may be mapped.
        let mut done = 0;
        while done < count {
            let at = offset.saturating_add(done as u64);
            let inside = (at % PAGE) as usize;
            let len = (PAGE as usize - inside).min(count - done);
            if let Some(frame) = state.pages.get(&(at / PAGE)) {
                // SAFETY: the cache owns the frame.
                let bytes = unsafe { frames::bytes(*frame) };
                if let (Some(to), Some(from)) = (
                    bytes.get_mut(inside..inside + len),
                    from.get(done..done + len),
                ) {
                    to.copy_from_slice(from);
                }
            }
            done += len;
        }
        let end = offset.saturating_add(count as u64);
        state.attributes.size = state.attributes.size.max(end);
        // The host has new times, which are asked for when somebody wants them. They are our own
        // change, so the pages stay.
        state.valid_until = 0;
        state.changed_by_us = true;
        Ok(count)
    }

    /// A page that is mapped so that programs can change it was touched.
    pub fn page_changed(&self, index: u64) {
        let wants_handle = {
            let mut state = self.state.lock();
            state.dirty.insert(index);
            state.write_handle.is_none()
        };
        if wants_handle && let Ok(handle) = self.open_for_writing() {
            self.state.lock().write_handle = Some(handle);
        }
    }

    /// Writes the pages that programs may have changed through mappings to the host.
    pub fn write_back(&self) -> Result<(), Errno> {
        let (handle, size, dirty): (_, _, Vec<(u64, u64)>) = {
            let state = self.state.lock();
            let pages = state.dirty.iter();
            let pages = pages.filter_map(|i| state.pages.get(i).map(|frame| (*i, *frame)));
            (state.write_handle, state.attributes.size, pages.collect())
        };
        let Some(handle) = handle else { return Ok(()) };
        for (index, frame) in dirty {
            let start = index * PAGE;
            if start >= size {
                continue;
            }
            let len = PAGE.min(size - start) as usize;
            // SAFETY: the cache owns the frame; dirty pages are not dropped.
            let bytes = unsafe { frames::bytes(frame) }
                .get(..len)
                .unwrap_or_default();
            let copy = bytes.to_vec();
            let mut done = 0;
            while done < len {
                let rest = copy.get(done..).unwrap_or_default();
                done += self.write(handle, start + done as u64, rest)?.max(1);
            }
        }
        Ok(())
    }

    /// There is one more shared mapping.
    pub fn mapped(&self) {
        self.state.lock().mappings += 1;
    }

    /// There is one less: what was changed through it goes to the host.
    pub fn unmapped(&self) {
        // An error has nobody to go to: the program that wrote has unmapped the file, or ended.
        let _ = self.write_back();
        let handle = {
            let mut state = self.state.lock();
            state.mappings = state.mappings.saturating_sub(1);
            if state.mappings > 0 {
                return;
            }
            state.dirty.clear();
            state.write_handle.take()
        };
        if let Some(handle) = handle {
            self.close(handle);
        }
    }

    /// Makes the host write the file to its disk.
    pub fn sync(&self, data_only: bool, handle: Option<u64>) -> Result<(), Errno> {
        self.write_back()?;
        let own = handle;
        let handle = match own {
            Some(handle) => handle,
            None => self.open_handle(Op::Open, 0)?,
        };
        let body = Body::new().u64(handle).u32(u32::from(data_only)).u32(0);
        let result = self
            .fuse()?
            .call(Op::Fsync, self.id, &body.0, &[], 16, |_| Ok(()));
        if own.is_none() {
            self.release_handle(Op::Release, handle);
        }
        result
    }
}
