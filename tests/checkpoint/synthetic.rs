//! Random checkpoints, and what `inspect` counts.

use std::fs;

use peregrine::checkpoint::{Checkpoint, FloatType};
use peregrine::inspect::inspect;
use peregrine::synth::{SynthOptions, SynthShape, synth, synth_bytes};

use crate::kit::{dequantise, open};
use crate::variants::{ASYMMETRIC, Model, TINY, TempDir, words};

#[test]
fn synthetic_checkpoints_open() {
    let default = SynthOptions::default;
    for options in [
        default(),
        SynthOptions { group_size: Some(32), sym: false, ..default() },
        SynthOptions { group_size: None, layers: Some(1), ..default() },
        SynthOptions { group_size: Some(128), act_order: true, tables: FloatType::F32, ..default() },
    ] {
        let dir = TempDir::new();
        let bytes = synth(SynthShape::TINY, dir.path(), &options, None).unwrap();
        assert_eq!(bytes, synth_bytes(SynthShape::TINY, &options));
        assert_eq!(bytes, fs::metadata(dir.path().join("model.safetensors")).unwrap().len());
        let checkpoint = open(&dir);
        let quant = checkpoint.quant();
        assert_eq!(quant.group_size, options.group_size, "{options:?}");
        assert_eq!(
            (quant.sym, quant.desc_act, quant.zero_offset),
            (options.sym, options.act_order, 1),
            "{options:?}"
        );
        assert_eq!(checkpoint.embedding().dtype, options.tables);
        let layers = options.layers.unwrap_or(2);
        assert_eq!(checkpoint.tensors().len(), layers * 22 + 4);
        assert!(
            checkpoint.lm_head().is_none() && checkpoint.warnings().is_empty(),
            "{:?}",
            checkpoint.warnings()
        );
    }
}

#[test]
fn synthetic_weights_are_sane_and_repeatable() {
    let (first, second, other) = (TempDir::new(), TempDir::new(), TempDir::new());
    let options = SynthOptions::default();
    for (dir, seed) in [(&first, 0), (&second, 0), (&other, 1)] {
        synth(SynthShape::TINY, dir.path(), &SynthOptions { seed, ..options.clone() }, None).unwrap();
    }
    let read = |dir: &TempDir| fs::read(dir.path().join("model.safetensors")).unwrap();
    assert!(read(&first) == read(&second) && read(&first) != read(&other));
    let checkpoint = open(&first);
    let layer = checkpoint.layer(1);
    let mut histogram = [0usize; 16];
    for word in words(layer.dense_4h_to_h.qweight) {
        (0..8).for_each(|i| histogram[(word >> (4 * i) & 15) as usize] += 1);
    }
    assert!(histogram.iter().all(|&count| count > 0), "{histogram:?}");
    // A matrix of gain g and k inputs has weights of g / sqrt(k); 4 % is what the spread of scales adds and more.
    for (matrix, gain) in [(&layer.query_key_value, 1.7), (&layer.dense_4h_to_h, 0.4)] {
        let weights = dequantise(matrix);
        let mean_square = weights.iter().map(|w| f64::from(w * w)).sum::<f64>() / weights.len() as f64;
        let size = (mean_square * matrix.k as f64).sqrt() / gain;
        assert!((0.96..1.04).contains(&size), "{}: {size}", matrix.name);
    }
    let message = synth(SynthShape::TINY, first.path(), &options, None).unwrap_err().to_string();
    assert!(message.contains("exists"), "{message}");
    let odd = SynthShape { hidden_size: 100, ..SynthShape::TINY };
    assert_eq!(synth(odd, other.path(), &options, None).unwrap_err().exit_code(), 2);
}

#[test]
fn a_synthetic_falcon_7b_has_the_real_ones_size() {
    // Data bytes by the shapes of the published model: both tables in F16, or both in F32; the header is 0.1 MB.
    for (tables, data) in [(FloatType::F16, 4_760_393_472), (FloatType::F32, 5_942_869_504u64)] {
        let bytes = synth_bytes(SynthShape::FALCON_7B, &SynthOptions { tables, ..SynthOptions::default() });
        assert!((data + 50_000..data + 150_000).contains(&bytes), "{tables:?}: {bytes}");
    }
}

#[test]
fn inspect_counts_what_is_there() {
    let report = inspect(&Checkpoint::open(TINY).unwrap(), Some(1 << 30));
    // By hand: 8 layers of 320 x (448 + 320 + 2 x 1280), 18 norm vectors, 4096 x 320.
    assert_eq!(report.parameters, 8 * 320 * 3328 + 18 * 320 + 4096 * 320);
    // A unit is 16 x 64 codes in 512 bytes and 16 scales in 32.
    assert_eq!(report.memory.matrices, 8 * 320 * 3328 / 1024 * (512 + 32));
    assert_eq!(report.memory.tables, 4096 * 320 * 2);
    assert_eq!(report.memory.kv_full_context, 8 * 2 * 64 * 2 * 2048);
    assert_eq!(report.memory.hopper_copy, report.memory.matrices + 4096 * 320 * 2);
    // Products of 320 inputs have less than a stage; those of 1600 five, of 80 row tiles in 5 parts, 3 of them in the longer stream. The table
    // has 256 row tiles in 132 shares: of 66 in either stream, with two row tiles at most, each has a group's two pieces for each of 5 units.
    assert_eq!(report.memory.hopper_batch_copy, 8 * 2 * 3 * 5 * 12 * 4096 + 2 * 66 * 5 * 2 * 4096);
    assert_eq!(report.tensors.iter().map(|t| t.count).sum::<usize>(), 180);
    assert_eq!(report.tensors.len(), 4 * 5 + 2 + 4);
    let text = report.to_string();
    for part in ["tiny-falcon-tales", "8 layers, width 320", "4 bits, group 64, symmetric", "it fits"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let json = report.to_json();
    assert_eq!(json["architecture"]["hidden_size"], 320);
    assert_eq!(json["quantization"]["zero_points"], "gptq");
    assert_eq!(json["memory"]["gpu_free"], 1 << 30);
    let asymmetric = inspect(&Checkpoint::open(ASYMMETRIC).unwrap(), None);
    assert!(asymmetric.memory.matrices > report.memory.matrices);
    let narrow = inspect(&open(&Model::tiny().group_32().write()), None);
    assert_eq!(narrow.memory.matrices, 8 * 320 * 3328 / 1024 * (512 + 64));
    println!("{text}");
}
