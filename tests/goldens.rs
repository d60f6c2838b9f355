//! The CPU device against Hugging Face's logits and greedy continuations.

mod golden;

use std::sync::Arc;

use peregrine::checkpoint::Checkpoint;
use peregrine::cpu::CpuModel;
use peregrine::engine::Device;

/// Largest difference of a logit from Hugging Face's f32 ones. Measured: 4.5e-5 over both sets, all prompts; logits
/// reach 20, where f32 has steps of 2e-6.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// Largest difference of a value of the residual stream after the first layer. Measured: 9.5e-7.
const HIDDEN_TOLERANCE: f32 = 3e-6;

#[test]
fn logits_match_hugging_face() {
    for set in ["a", "d"] {
        golden::check_logits(&golden::load(set, Device::Cpu).unwrap(), set, false, LOGIT_TOLERANCE);
    }
}

/// No margin of the goldens is within twice the tolerance (the smallest are 4.0e-4, 5.2e-4, 9.3e-4), so there are no
/// near-ties: all 1024 tokens must agree.
#[test]
fn greedy_continuations_match_hugging_face() {
    for set in ["a", "d"] {
        golden::check_greedy(&golden::load(set, Device::Cpu).unwrap(), set, LOGIT_TOLERANCE);
    }
}

#[test]
fn the_residual_stream_after_the_first_layer_matches_hugging_face() {
    for set in ["a", "d"] {
        let checkpoint = Checkpoint::open(&golden::model_path(set)).unwrap();
        let model = CpuModel::load(Arc::new(checkpoint)).unwrap();
        let first = &golden::goldens(set)[0];
        let want = first.hidden0.as_ref().expect("hidden0 of the first prompt");
        let difference = golden::worst(&model.hidden(&first.ids, 1).unwrap(), want);
        println!("{}: hidden0 differs by {difference:.2e}", first.name);
        assert!(difference <= HIDDEN_TOLERANCE, "wanted at most {HIDDEN_TOLERANCE:e}");
        assert!(model.hidden(&first.ids, 9).is_err(), "there are 8 layers");
        assert!(model.hidden(&[4096], 1).is_err(), "ids end at 4095");
    }
}

/// Every sum of the reference has one order, however many tokens a call brings; so the logits token by token need no
/// golden check of their own.
#[test]
fn prefill_equals_token_by_token_to_the_bit() {
    for set in ["a", "d"] {
        let engine = golden::load(set, Device::Cpu).unwrap();
        let ids = &golden::goldens(set)[3].ids;
        assert_eq!(golden::logits(&engine, ids, false), golden::logits(&engine, ids, true));
    }
}
