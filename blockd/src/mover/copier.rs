//! Copying and comparing extents, on tokio-uring in a thread of its own.
//!
//! Latency does not matter here and throughput is bounded by the disks, so the comfort of futures is worth an extra
//! round trip for each wake-up. A future that was started is always awaited to its end: dropping one would not cancel
//! its I/O.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use formats::{AllocState, ByteSpan, ErrorKind, ImageError, Pieces, Place, Shared, ZeroMode};
use mirror::{Action, CopyResult, Event, ExtentRange, Latencies, VerifyResult};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_uring::buf::{BoundedBuf, IoBuf, IoBufMut};
use tokio_uring::fs::File;

use super::shared::MoveShared;
use crate::disk::handle::ImageHandle;
use crate::disk::shared::DiskShared;
use crate::gate::{Gate, GateShard};
use crate::histogram::Snapshot;
use crate::worker::buffer::AlignedBuffer;

/// What a guest's marks wait at most before the machine hears of them.
const DELIVER_MARKS_EVERY: Duration = Duration::from_millis(20);
/// How often the machine hears how long the guest's requests take.
const LISTEN_EVERY: Duration = Duration::from_millis(50);
/// Zeroes in multiples of this are not written to the target: 16 KiB. Smaller gaps cost more in requests than in space.
const ZERO_RUN: usize = 16 << 10;

// SAFETY: the buffer's memory does not move when the handle does, and is initialised from the start.
unsafe impl IoBuf for AlignedBuffer {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ptr()
    }
    fn bytes_init(&self) -> usize {
        self.len()
    }
    fn bytes_total(&self) -> usize {
        self.len()
    }
}

// SAFETY: as above; the kernel writes within the buffer only.
unsafe impl IoBufMut for AlignedBuffer {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.as_ptr()
    }
    unsafe fn set_init(&mut self, _pos: usize) {}
}

/// One image as the copier uses it.
struct Side {
    image: Arc<ImageHandle>,
    files: Vec<Rc<File>>,
}

impl Side {
    fn new(image: &Arc<ImageHandle>) -> std::io::Result<Self> {
        let files = image.files().iter().map(|f| Ok(Rc::new(File::from_std(f.file().try_clone()?))));
        Ok(Self { image: image.clone(), files: files.collect::<std::io::Result<_>>()? })
    }

    /// Reads a span into the beginning of the buffer.
    async fn read(&self, span: ByteSpan, mut buffer: AlignedBuffer) -> Result<AlignedBuffer, String> {
        let mut pieces = Pieces::new();
        self.image.image().map_read(span, &mut pieces).map_err(|e| e.to_string())?;
        let mut at = 0;
        for piece in pieces.iter() {
            let end = at + piece.len as usize;
            match piece.place {
                Place::Zero => buffer.as_mut_slice()[at..end].fill(0),
                Place::Parent => {
                    unreachable!("what is moved has its parents, and their pieces are places in files")
                }
                Place::File { file, offset } => {
                    buffer = read_exact(&self.files[usize::from(file.0)], buffer, at, end, offset).await?;
                }
            }
            at = end;
        }
        Ok(buffer)
    }

    fn is_all_zero(&self, span: ByteSpan) -> Result<bool, String> {
        let mut pieces = Pieces::new();
        self.image.image().map_read(span, &mut pieces).map_err(|e| e.to_string())?;
        Ok(pieces.iter().all(|p| p.place == Place::Zero))
    }

    /// Writes `[from, to)` of the buffer at `offset` of the disk.
    async fn write(
        &self,
        mut buffer: AlignedBuffer,
        from: usize,
        to: usize,
        offset: u64,
    ) -> (AlignedBuffer, Result<(), Fail>) {
        let mut pieces = Pieces::new();
        let span = ByteSpan::new(offset, (to - from) as u64);
        if let Err(e) = self.image.image().map_write(span, &mut pieces) {
            return (buffer, Err(Fail::from(e)));
        }
        let mut at = from;
        for piece in pieces.iter() {
            let Place::File { file, offset } = piece.place else { continue };
            let end = at + piece.len as usize;
            let (back, done) = write_all(&self.files[usize::from(file.0)], buffer, at, end, offset).await;
            buffer = back;
            if let Err(e) = done {
                return (buffer, Err(Fail::from(e)));
            }
            at = end;
        }
        (buffer, self.image.image().wrote(span).map_err(Fail::from))
    }

    /// Makes a span read as zeroes; touches the file only where it may hold something else.
    async fn zero(&self, span: ByteSpan) -> Result<(), Fail> {
        let mut pieces = Pieces::new();
        let mapped = self.image.image().map_zero(span, ZeroMode::Unmap, &mut pieces);
        mapped.map_err(Fail::from)?;
        for piece in pieces.iter() {
            let Place::File { offset, .. } = piece.place else { continue };
            let storage = &self.image.image().files()[0];
            let data = storage.next_data(offset).map_err(Fail::from)?;
            if data.is_some_and(|(start, _)| start < offset + piece.len) {
                // The few cases where an extent turned to zeroes after it had been copied: not worth a ring.
                storage.punch(offset, piece.len).map_err(Fail::from)?;
            }
        }
        self.image.image().wrote(span).map_err(Fail::from)
    }
}

struct Fail {
    full: bool,
    message: String,
}

impl From<ImageError> for Fail {
    fn from(e: ImageError) -> Self {
        Self { full: e.kind == ErrorKind::NoSpace, message: e.to_string() }
    }
}

impl From<std::io::Error> for Fail {
    fn from(e: std::io::Error) -> Self {
        let full = matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
        Self { full, message: e.to_string() }
    }
}

async fn read_exact(
    file: &File,
    mut buffer: AlignedBuffer,
    from: usize,
    to: usize,
    offset: u64,
) -> Result<AlignedBuffer, String> {
    let mut done = 0;
    while from + done < to {
        let (result, slice) = file.read_at(buffer.slice(from + done..to), offset + done as u64).await;
        buffer = slice.into_inner();
        match result {
            Ok(0) => {
                return Err(format!(
                    "the file ends at byte {}, though the image does not",
                    offset + done as u64
                ));
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(format!("cannot read at byte {} of the file: {e}", offset + done as u64)),
        }
    }
    Ok(buffer)
}

async fn write_all(
    file: &File,
    mut buffer: AlignedBuffer,
    from: usize,
    to: usize,
    offset: u64,
) -> (AlignedBuffer, std::io::Result<()>) {
    let mut done = 0;
    while from + done < to {
        let (result, slice) =
            file.write_at(buffer.slice(from + done..to), offset + done as u64).submit().await;
        buffer = slice.into_inner();
        match result {
            Ok(0) => return (buffer, Err(std::io::ErrorKind::WriteZero.into())),
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return (buffer, Err(e)),
        }
    }
    (buffer, Ok(()))
}

/// Everything that copies share.
struct Copier {
    shared: Arc<MoveShared>,
    source: Side,
    target: Side,
    shard: GateShard,
    gate: Arc<Gate>,
    disk_size: u64,
    /// The target is a part of the source: what only it has is equal on both sides.
    is_merge: bool,
    copy_bytes_max: usize,
    /// Whether the target may share blocks with the source instead of having a copy of them.
    may_share: Cell<bool>,
    buffers: std::cell::RefCell<Vec<AlignedBuffer>>,
    maintaining: Arc<AtomicBool>,
}

/// Carries out copies and verifications until the channel of actions ends; hands everything else to `control`. The machine
/// hears of the requests that ended since `heard`.
pub(super) fn run(
    shared: Arc<MoveShared>,
    disk: &DiskShared,
    mut heard: Snapshot,
    config: &mirror::Config,
    is_merge: bool,
    actions: UnboundedReceiver<Action>,
    control: &dyn Fn(Action) -> ControlFlow<()>,
) -> std::io::Result<()> {
    let copier = Rc::new(Copier {
        source: Side::new(shared.source())?,
        target: Side::new(shared.target())?,
        shard: disk.gate.shard(),
        gate: disk.gate.clone(),
        disk_size: config.disk_size,
        is_merge,
        copy_bytes_max: config.copy_bytes_max as usize,
        may_share: Cell::new(formats::may_share(shared.target().image())),
        buffers: Default::default(),
        maintaining: Arc::default(),
        shared,
    });
    let runtime = tokio_uring::Runtime::new(&tokio_uring::builder())?;
    let listen = || {
        let now = disk.counters.latencies();
        let latencies = now.since(&heard).collect();
        heard = now;
        latencies
    };
    runtime.block_on(copier.serve(actions, control, listen));
    Ok(())
}

impl Copier {
    async fn serve(
        self: Rc<Self>,
        mut actions: UnboundedReceiver<Action>,
        control: &dyn Fn(Action) -> ControlFlow<()>,
        mut listen: impl FnMut() -> Latencies,
    ) {
        let mut wake: Option<tokio::time::Instant> = None;
        let mut marks = tokio::time::interval(DELIVER_MARKS_EVERY);
        marks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut listening = tokio::time::interval(LISTEN_EVERY);
        listening.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let alarm = wake.unwrap_or_else(|| tokio::time::Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                action = actions.recv() => match action {
                    None => return,
                    Some(Action::Copy { id, range }) => {
                        let me = self.clone();
                        tokio_uring::spawn(async move {
                            let entry = me.shard.enter();
                            let result = me.copy(range).await;
                            me.shard.leave(entry);
                            me.maintain_target();
                            me.shared.apply(Event::CopyEnd { id, result });
                        });
                    }
                    Some(Action::Verify { id, range }) => {
                        let me = self.clone();
                        tokio_uring::spawn(async move {
                            let entry = me.shard.enter();
                            let result = me.verify(range).await;
                            me.shard.leave(entry);
                            me.shared.apply(Event::VerifyEnd { id, result });
                        });
                    }
                    Some(Action::Wake(at)) => {
                        let at = tokio::time::Instant::now() + Duration::from_micros(at.us_since(self.shared.now()));
                        wake = Some(wake.map_or(at, |before| before.min(at)));
                    }
                    Some(other) => if control(other).is_break() {
                        return;
                    },
                },
                () = tokio::time::sleep_until(alarm), if wake.is_some() => {
                    wake = None;
                    self.shared.apply(Event::Tick);
                }
                _ = marks.tick() => self.shared.deliver_marks(),
                _ = listening.tick() => self.shared.apply(Event::GuestServed(listen())),
            }
        }
    }

    fn span_of(&self, range: ExtentRange) -> ByteSpan {
        let start = u64::from(range.first) * self.shared.extent_size;
        let end = (u64::from(range.end()) * self.shared.extent_size).min(self.disk_size);
        ByteSpan::new(start, end - start)
    }

    fn take_buffer(&self) -> AlignedBuffer {
        let mut buffers = self.buffers.borrow_mut();
        if buffers.is_empty() {
            buffers.extend(AlignedBuffer::carve(self.copy_bytes_max));
        }
        buffers.pop().expect("there are some")
    }

    fn put_buffer(&self, buffer: AlignedBuffer) {
        self.buffers.borrow_mut().push(buffer);
    }

    async fn copy(&self, range: ExtentRange) -> CopyResult {
        let span = self.span_of(range);
        let (mut at, end) = (span.offset, span.offset + span.len);
        let (mut bytes_written, mut bytes_zero) = (0, 0);
        while at < end {
            let (len, is_held) = match self.next_held(at, end) {
                Ok(run) => run,
                Err(e) => return CopyResult::SourceError(e),
            };
            if is_held {
                match self.copy_span(ByteSpan::new(at, len)).await {
                    Ok((written, zero)) => {
                        (bytes_written, bytes_zero) = (bytes_written + written, bytes_zero + zero)
                    }
                    Err(failed) => return failed,
                }
            } else {
                bytes_zero += len;
            }
            at += len;
        }
        CopyResult::Done { bytes_written, bytes_zero }
    }

    async fn copy_span(&self, span: ByteSpan) -> Result<(u64, u64), CopyResult> {
        if self.share(span) {
            return Ok((span.len, 0));
        }
        let read = self.source.read(span, self.take_buffer()).await;
        let buffer = read.map_err(CopyResult::SourceError)?;
        let (buffer, result) = self.write_thin(buffer, span).await;
        self.put_buffer(buffer);
        result.map_err(|fail| match fail {
            Fail { full: true, message } => CopyResult::TargetFull(message),
            Fail { message, .. } => CopyResult::TargetError(message),
        })
    }

    /// Whether the target shares the blocks of this span now. As with a copy, what a guest writes meanwhile is marked and
    /// comes after it.
    fn share(&self, span: ByteSpan) -> bool {
        if !self.may_share.get() {
            return false;
        }
        match formats::share_payload(self.source.image.image(), self.target.image.image(), span) {
            Ok(Shared::Yes) => true,
            // The copy meets the same error, and says whose it is.
            Ok(Shared::No) | Err(_) => false,
            Ok(Shared::Never) => {
                self.may_share.set(false);
                false
            }
        }
    }

    /// How much from `at` on, up to `end`, is to be copied, or else may be left to the layers below: where neither the
    /// source's newest layers nor the target's have anything, both read what is below, which is the same.
    fn next_held(&self, at: u64, end: u64) -> Result<(u64, bool), String> {
        let Some(levels) = self.shared.own_levels else { return Ok((end - at, true)) };
        let mut to = at;
        let mut first = None;
        while to < end {
            let (len, is_held) = self.own_run(levels, to)?;
            if *first.get_or_insert(is_held) != is_held {
                break;
            }
            to += len;
        }
        Ok((to.min(end) - at, first.unwrap_or(true)))
    }

    fn own_run(&self, levels: usize, at: u64) -> Result<(u64, bool), String> {
        let own = |side: &Side, levels| match side.image.image().as_chain() {
            Some(chain) => chain.next_own_extent(levels, at).map_err(|e| e.to_string()),
            None => Ok(None),
        };
        let whole = self.disk_size - at;
        let Some(source) = own(&self.source, levels)? else { return Ok((whole, true)) };
        if source.state != AllocState::Absent || self.is_merge {
            return Ok((source.span.len, source.state != AllocState::Absent));
        }
        let Some(target) = own(&self.target, 1)? else { return Ok((source.span.len, true)) };
        // What a guest's write left on the target alone, when it failed on the source, must not stay.
        Ok((source.span.len.min(target.span.len), target.state != AllocState::Absent))
    }

    /// Writes what is not zeroes and zeroes the rest. Returns how many bytes each.
    async fn write_thin(
        &self,
        mut buffer: AlignedBuffer,
        span: ByteSpan,
    ) -> (AlignedBuffer, Result<(u64, u64), Fail>) {
        let len = span.len as usize;
        let (mut written, mut zero, mut at) = (0, 0, 0);
        while at < len {
            let (end, is_zero) = next_run(&buffer.as_slice()[..len], at);
            let offset = span.offset + at as u64;
            let result = if is_zero {
                zero += (end - at) as u64;
                self.target.zero(ByteSpan::new(offset, (end - at) as u64)).await
            } else {
                written += (end - at) as u64;
                let (back, result) = self.target.write(buffer, at, end, offset).await;
                buffer = back;
                result
            };
            if let Err(e) = result {
                return (buffer, Err(e));
            }
            at = end;
        }
        (buffer, Ok((written, zero)))
    }

    async fn verify(&self, range: ExtentRange) -> VerifyResult {
        let span = self.span_of(range);
        if self.is_merge {
            match self.next_held(span.offset, span.offset + span.len) {
                // Both sides read the same bytes of the same file there.
                Ok((len, false)) if len == span.len => return VerifyResult::Equal,
                Ok(_) => {}
                Err(e) => return VerifyResult::SourceError(e),
            }
        }
        match (self.source.is_all_zero(span), self.target.is_all_zero(span)) {
            (Ok(true), Ok(true)) => return VerifyResult::Equal,
            (Err(e), _) => return VerifyResult::SourceError(e),
            (_, Err(e)) => return VerifyResult::TargetError(e),
            _ => {}
        }
        let (a, b) = futures_util::future::join(
            self.source.read(span, self.take_buffer()),
            self.target.read(span, self.take_buffer()),
        )
        .await;
        let (a, b) = match (a, b) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(e), _) => return VerifyResult::SourceError(e),
            (_, Err(e)) => return VerifyResult::TargetError(e),
        };
        let len = span.len as usize;
        let (x, y) = (&a.as_slice()[..len], &b.as_slice()[..len]);
        let result = if x == y {
            VerifyResult::Equal
        } else {
            let first = x.iter().zip(y).position(|(x, y)| x != y).expect("they differ");
            VerifyResult::Different { offset: span.offset + first as u64 }
        };
        self.put_buffer(a);
        self.put_buffer(b);
        result
    }

    /// Looks after the target while the disk does not know it yet, so that copies need not wait for its log.
    fn maintain_target(&self) {
        let image = &self.target.image;
        if !image.image().wants_maintenance() || self.maintaining.swap(true, Ordering::AcqRel) {
            return;
        }
        let (image, gate, maintaining) = (image.clone(), self.gate.clone(), self.maintaining.clone());
        let done = self.maintaining.clone();
        let thread = std::thread::Builder::new().name("maintenance".into()).spawn(move || {
            if let Err(e) = image.maintain(&|| gate.wait()) {
                tracing::warn!(image = %image.path().display(), "maintenance failed: {e}");
            }
            maintaining.store(false, Ordering::Release);
        });
        if thread.is_err() {
            // The codec looks after itself when it must; it only takes longer.
            done.store(false, Ordering::Release);
        }
    }
}

/// The end of the run of zeroes, or of something else, that begins at `at`.
fn next_run(data: &[u8], at: usize) -> (usize, bool) {
    let is_zero = |from: usize| is_zero(&data[from..(from + ZERO_RUN).min(data.len())]);
    let first = is_zero(at);
    let mut end = at + ZERO_RUN;
    while end < data.len() && is_zero(end) == first {
        end += ZERO_RUN;
    }
    (end.min(data.len()), first)
}

fn is_zero(data: &[u8]) -> bool {
    let (chunks, rest) = data.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |a, b| a | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_data_and_tell_zeroes_from_the_rest() {
        let mut data = vec![0u8; ZERO_RUN * 5 + 700];
        data[ZERO_RUN * 2 + 5] = 1;
        *data.last_mut().expect("not empty") = 9;
        let (mut at, mut runs) = (0, Vec::new());
        while at < data.len() {
            let (end, zero) = next_run(&data, at);
            runs.push((end, zero));
            at = end;
        }
        let r = ZERO_RUN;
        assert_eq!(runs, [(2 * r, true), (3 * r, false), (5 * r, true), (5 * r + 700, false)]);
    }
}
