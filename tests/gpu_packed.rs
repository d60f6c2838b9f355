//! Models whose table takes 12 bits a value on the GPU (`table_pack`), beside the same with one value that needs more, for which the table
//! stays f16: all other logits have the same bits, by the persistent kernel and by one kernel an op, alone and in batches.
//! Without a GPU the test prints why it was skipped; with PEREGRINE_REQUIRE_GPU=1 it fails instead.

#![cfg(feature = "cuda")]
#![allow(clippy::expect_used, reason = "a test's helper fails by panicking")]

mod golden;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use peregrine::checkpoint::Checkpoint;
use peregrine::cuda::{CudaBatch, CudaModel};
use peregrine::layout::{f16_to_f32, f32_to_f16};

const VOCAB: usize = 4096;
const HIDDEN: usize = 320;

/// The checkpoint of a golden set with a table of values of eight significant bits, a sixteenth of what they were; `misfit`: the very last
/// one is 0.3, whose f16 has ten.
fn with_table(folder: &Path, set: &str, misfit: bool) -> PathBuf {
    let to = folder.join(format!("{set}-{misfit}"));
    golden::edited(&PathBuf::from(golden::model_path(set)), &to, |name, table| {
        if !["transformer.word_embeddings.weight", "lm_head.weight"].contains(&name) {
            return;
        }
        assert_eq!(table.len(), 2 * VOCAB * HIDDEN, "{set}: {name}");
        for half in table.chunks_exact_mut(2) {
            let value = f16_to_f32(u16::from_le_bytes([half[0], half[1]])) / 16.0;
            half.copy_from_slice(&(f32_to_f16(value) & !7).to_le_bytes());
        }
        if misfit {
            table[2 * VOCAB * HIDDEN - 2..].copy_from_slice(&f32_to_f16(0.3).to_le_bytes());
        }
    });
    to
}

/// Bits of the logits of forced steps of several texts, but for the last id's.
fn logits(model: &Arc<CudaModel>, slots: usize) -> Vec<u32> {
    let mut batch = CudaBatch::new(Arc::clone(model), slots, 128).expect("batch");
    for slot in 0..slots {
        let ids: Vec<u32> = (0..1 + slot as u32 % 40).map(|i| (i * 37 + slot as u32 * 5) % 4000).collect();
        batch.prefill(slot, &ids).expect("prefill");
    }
    let mut all = Vec::new();
    for step in 0..4 {
        let ids: Vec<u32> = (0..slots as u32).map(|slot| (slot * 31 + step * 17 + 12) % 4000).collect();
        let logits = batch.decode(&ids).expect("decode");
        all.extend(logits.chunks(VOCAB).flat_map(|row| row[..VOCAB - 1].iter().map(|logit| logit.to_bits())));
    }
    all
}

#[test]
fn cuda_a_packed_table_changes_no_logit() {
    let folder = std::env::temp_dir().join(format!("peregrine-packed-{}", std::process::id()));
    for set in ["a", "d"] {
        let load = |misfit| {
            let path = with_table(&folder, set, misfit).display().to_string();
            golden::unless_no_gpu(Checkpoint::open(&path).and_then(|c| CudaModel::load(&c, 0, None)))
        };
        let (Some(packed), Some(plain)) = (load(false), load(true)) else { break };
        let saved = plain.step_weight_bytes() - packed.step_weight_bytes();
        assert_eq!(saved, (VOCAB * HIDDEN / 2) as u64, "{set}: four bits a value");
        let per_op = |misfit| load(misfit).map(CudaModel::without_persistent);
        let (Some(packed_per_op), Some(plain_per_op)) = (per_op(false), per_op(true)) else { break };
        for (way, packed, plain) in
            [("as it comes", packed, plain), ("one kernel an op", packed_per_op, plain_per_op)]
        {
            let (packed, plain) = (Arc::new(packed), Arc::new(plain));
            for slots in [1, 3, 8, 9, 20, 40] {
                let (got, want) = (logits(&packed, slots), logits(&plain, slots));
                assert!(want.iter().any(|bits| f32::from_bits(*bits).abs() > 1e-3), "{set}: all near zero");
                assert!(got == want, "{set}, {way}: {slots} texts");
            }
        }
    }
    let _ = fs::remove_dir_all(folder);
}
