//! `decode_step` where it has a block a multiprocessor, and blocks read the weights of their side of L2 (`cuda/sides.cuh`): the models of
//! the other tests are too small for that. Its logits are those of one kernel an op but for rounding, of a text alone whatever runs beside
//! it, and of a process that knows nothing of sides.
//! Without a GPU the tests print why they were skipped; with PEREGRINE_REQUIRE_GPU=1 they fail instead.

#![cfg(feature = "cuda")]
#![allow(clippy::expect_used, reason = "a test's helper fails by panicking")]

mod golden;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use peregrine::checkpoint::Checkpoint;
use peregrine::cuda::{CudaBatch, CudaModel};
use peregrine::layout::{f16_to_f32, f32_to_f16};
use peregrine::synth::{SynthOptions, SynthShape, synth};

/// 140 row tiles of 16, more than an H200 has multiprocessors. 35 units of inputs: two groups of consumers, the second with 11.
const SHAPE: SynthShape =
    SynthShape { hidden_size: 2240, num_layers: 2, ffn_size: 4 * 2240, vocab_size: 4096 };
/// Largest difference between logits of the persistent kernel and of one kernel an op. Measured on an H200: 0.0051.
const STEP_TOLERANCE: f32 = 0.007;
/// The same with norms 8192 as large (measured: 0.0057), and 1/4096, of which the smallest step of the fixed point keeps less (0.0082).
const LARGE_TOLERANCE: f32 = 0.007;
const SMALL_TOLERANCE: f32 = 0.0115;
const STEPS: u32 = 4;

/// The same but for norms that are `factor` as large, and matrices behind them as much smaller.
fn with_norms_of(folder: &Path, factor: f32) -> PathBuf {
    let to = folder.with_extension(format!("norms-{factor}"));
    golden::edited(folder, &to, |name, values| {
        let by = match name.rsplit_once("input_layernorm.").is_some() {
            true => factor,
            false if name.contains("query_key_value.scales") || name.contains("dense_h_to_4h.scales") => {
                1.0 / factor
            }
            false => return,
        };
        for half in values.chunks_exact_mut(2) {
            let value = f16_to_f32(u16::from_le_bytes([half[0], half[1]])) * by;
            half.copy_from_slice(&f32_to_f16(value).to_le_bytes());
        }
    });
    to
}

fn model(folder: &Path) -> Option<CudaModel> {
    let folder = folder.display().to_string();
    golden::unless_no_gpu(Checkpoint::open(&folder).and_then(|c| CudaModel::load(&c, 0, None)))
}

fn ids(text: usize) -> Vec<u32> {
    // 510: the steps go over position 512, from which on items of attention are longer.
    let length = [129, 1, 64, 65, 510, 700, 128, 30][text];
    (0..length).map(|i| (i * 37 + text as u32 * 501) % 4000).collect()
}

/// Logits of forced steps of `texts` from `first` on, text by text.
fn logits(model: &Arc<CudaModel>, first: usize, texts: usize) -> Vec<Vec<f32>> {
    let mut batch = CudaBatch::new(Arc::clone(model), texts, 1024).expect("batch");
    for slot in 0..texts {
        batch.prefill(slot, &ids(first + slot)).expect("prefill");
    }
    let mut all = vec![Vec::new(); texts];
    for step in 0..STEPS {
        let next: Vec<u32> =
            (0..texts).map(|slot| ((first + slot) as u32 * 31 + step * 17 + 12) % 4000).collect();
        let together = batch.decode(&next).expect("decode");
        for (row, text) in together.chunks(together.len() / texts).zip(&mut all) {
            text.extend_from_slice(row);
        }
    }
    all
}

fn bits(logits: &[Vec<f32>]) -> Vec<u32> {
    logits.iter().flatten().map(|logit| logit.to_bits()).collect()
}

/// Of the logits of 1, 4 and 8 texts.
fn hash(model: &Arc<CudaModel>) -> u64 {
    let all = [1, 4, 8].into_iter().flat_map(|texts| bits(&logits(model, 0, texts)));
    all.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3))
}

/// Logits beside those of one kernel an op, of each text alone, and of a second run.
fn check(folder: &Path, tolerance: f32) -> Option<Arc<CudaModel>> {
    let (placed, per_op) = (model(folder)?, model(folder)?.without_persistent());
    let why_not = placed.why_not_persistent();
    println!("{}: {}", placed.device_name(), why_not.unwrap_or("persistent decode steps"));
    // Else this would compare one kernel an op with itself.
    let hopper = ["H100", "H200"].iter().any(|name| placed.device_name().contains(name));
    let switched = std::env::var_os("PEREGRINE_NO_PERSISTENT").is_some();
    assert!(!hopper || switched || why_not.is_none(), "{why_not:?}");
    let (placed, per_op) = (Arc::new(placed), Arc::new(per_op));
    let alone: Vec<_> = (0..8).flat_map(|text| logits(&placed, text, 1)).collect();
    for texts in [1, 2, 4, 5, 8] {
        let (got, want) = (logits(&placed, 0, texts), logits(&per_op, 0, texts));
        assert!(want.iter().flatten().any(|logit| logit.abs() > 1.0), "all near zero");
        let difference = got.iter().zip(&want).map(|(a, b)| golden::worst(a, b)).fold(0.0, f32::max);
        println!("{texts} texts: logits differ by {difference:.2e} from those of one kernel an op");
        assert!(difference <= tolerance, "{texts} texts");
        assert!(bits(&got) == bits(&alone[..texts]), "{texts} texts: not the bits of each alone");
        assert!(bits(&got) == bits(&logits(&placed, 0, texts)), "{texts} texts: a second run differs");
    }
    Some(placed)
}

#[test]
fn cuda_steps_of_placed_blocks() {
    if golden::gpu().is_none() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("peregrine-placed-{}", std::process::id()));
    synth(SHAPE, &folder, &SynthOptions::default(), None).expect("synth");
    let Some(placed) = check(&folder, STEP_TOLERANCE) else { return };
    // A process that does not ask for sides.
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "without_sides", "--nocapture"])
        .env("PEREGRINE_NO_SIDES", "1")
        .env("PEREGRINE_PLACED_MODEL", &folder)
        .output()
        .expect("a second process");
    let said = String::from_utf8_lossy(&child.stdout);
    let want = format!("hash {:016x}", hash(&placed));
    assert!(child.status.success() && said.contains(&want), "wanted {want}: {said}");
    drop(placed);
    // Inputs for which f16 has no factor that makes them fixed point in one multiplication, and inputs below the smallest step's range.
    for (factor, tolerance) in [(8192.0, LARGE_TOLERANCE), (1.0 / 4096.0, SMALL_TOLERANCE)] {
        let changed = with_norms_of(&folder, factor);
        println!("norms {factor} as large");
        check(&changed, tolerance);
        fs::remove_dir_all(changed).expect("remove");
    }
    fs::remove_dir_all(folder).expect("remove");
}

#[test]
#[ignore = "run by cuda_steps_of_placed_blocks, in a process of its own"]
fn without_sides() {
    let Ok(folder) = std::env::var("PEREGRINE_PLACED_MODEL") else { return };
    let Some(model) = model(Path::new(&folder)).map(Arc::new) else { return };
    println!("hash {:016x}", hash(&model));
}
