//! Opening with a limit on the heap, and ways to spoil the good checkpoint.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use peregrine::Error;
use peregrine::checkpoint::Checkpoint;
use serde_json::Value;

use crate::variants::{Model, TempDir, header, serialize, with_header};

/// Most heap bytes that opening any file here may hold at once on the opening thread. What costs most is parsed JSON
/// of the largest header accepted (1 MB of text): measured 28 MB, times 2.
const MAX_HEAP_BYTES: usize = 56 << 20;

/// Counts what each thread holds, and the most it ever held.
struct Counting;

thread_local! {
    static HELD: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn count(change: impl FnOnce(usize) -> usize) {
    // A thread that is ending has no counter any more.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        let now = change(now);
        held.set((now, most.max(now)));
    });
}

// SAFETY: hands everything to the system's allocator and only counts.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|now| now + layout.size());
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(|now| now.saturating_sub(layout.size()));
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that any opening held, for the figure above.
pub(crate) static MOST: AtomicUsize = AtomicUsize::new(0);

/// Opens `model`, and fails the test if that took more than [`MAX_HEAP_BYTES`].
pub(crate) fn open(model: &str) -> Result<Checkpoint, Error> {
    let before = HELD.get().0;
    HELD.set((before, before));
    let result = Checkpoint::open(model);
    let peak = HELD.get().1 - before;
    MOST.fetch_max(peak, Ordering::Relaxed);
    assert!(peak <= MAX_HEAP_BYTES, "opening {model} held {peak} bytes");
    result
}

/// Opening must fail with status 4 and one line that has all of `parts`.
#[track_caller]
pub(crate) fn refused(model: &str, parts: &[&str]) {
    let Err(error) = open(model) else { panic!("was opened; wanted an error with {parts:?}") };
    let line = error.to_string();
    assert_eq!(error.exit_code(), 4, "{line}");
    assert!(!line.contains('\n') && line.len() < 1000, "not one line: {line}");
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in: {line}");
    }
}

/// One layer of the tiny model: the smallest good checkpoint.
pub(crate) static GOOD: LazyLock<Model> = LazyLock::new(|| Model::tiny().cut(1, 256));

pub(crate) const FILE: &str = "model.safetensors";
pub(crate) const QKV: &str = "transformer.h.0.self_attention.query_key_value";
pub(crate) const DOWN: &str = "transformer.h.0.mlp.dense_4h_to_h";

/// Spoils the model before it is written.
#[track_caller]
pub(crate) fn spoilt(change: impl FnOnce(&mut Model), parts: &[&str]) {
    let mut model = GOOD.clone();
    change(&mut model);
    refused(model.write().str(), parts);
}

/// Spoils the bytes of the weights file.
#[track_caller]
pub(crate) fn spoilt_bytes(change: impl FnOnce(Vec<u8>) -> Vec<u8>, parts: &[&str]) {
    let dir = TempDir::new();
    GOOD.write_json(dir.path());
    fs::write(dir.path().join(FILE), change(serialize(GOOD.tensors.iter()))).unwrap();
    refused(dir.str(), parts);
}

/// Spoils the header, as JSON; the data stays.
#[track_caller]
pub(crate) fn spoilt_header(change: impl FnOnce(&mut Value), parts: &[&str]) {
    let mut json = Value::Object(header(GOOD.tensors.iter()));
    change(&mut json);
    spoilt_header_text(&json.to_string(), parts);
}

#[track_caller]
pub(crate) fn spoilt_header_text(text: &str, parts: &[&str]) {
    let data: Vec<u8> = GOOD.tensors.values().flat_map(|t| t.bytes.iter().copied()).collect();
    spoilt_bytes(|_| with_header(text, &data), parts);
}

/// Spoils a file of the folder.
#[track_caller]
pub(crate) fn spoilt_file(name: &str, contents: &[u8], parts: &[&str]) {
    let dir = GOOD.write();
    fs::write(dir.path().join(name), contents).unwrap();
    refused(dir.str(), parts);
}
