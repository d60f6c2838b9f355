//! Several sequences together.

use std::sync::Arc;

use peregrine::checkpoint::Checkpoint;
use peregrine::cuda::{CudaBatch, CudaModel, CudaTimeline};
use peregrine::gpu::ops::ATTN_SHORT;
use peregrine::sampler::Sampling;
use peregrine::{Error, Result};

use crate::{CONTEXT, answer, bits, both, golden, model, settings};

/// The same of more than 8 slots, whose products are `gptq_batch`'s, and of one. Measured on an H200: 0.0365 of 17 to 64, 0.0250 of 9
/// and 16, whose activations are bytes.
const BATCH_TOLERANCE: f32 = 0.041;

/// As many prompts as there are slots, of different lengths.
fn slot_prompts(slots: usize) -> Vec<Vec<u32>> {
    let long = &golden::goldens("a")[2].ids;
    let length = |slot: usize| [1, 63, 64, 65, 7, 128, 30, 100][slot % 8];
    (0..slots).map(|slot| long[slot % 50..][..length(slot)].to_vec()).collect()
}

/// A batch with its slots prefilled.
fn batch(model: &Arc<CudaModel>, prompts: &[Vec<u32>]) -> CudaBatch {
    let mut batch = CudaBatch::new(Arc::clone(model), prompts.len(), CONTEXT).expect("batch");
    for (slot, ids) in prompts.iter().enumerate() {
        batch.prefill(slot, ids).expect("prefill");
    }
    batch
}

/// Logits [steps][slots * vocab] of steps whose tokens are given.
fn forced(model: &Arc<CudaModel>, prompts: &[Vec<u32>], first: usize) -> Vec<Vec<f32>> {
    let mut batch = batch(model, prompts);
    let id = |slot: usize, step: usize| ((first + slot) * 31 + step * 17 + 12) as u32 % 4096;
    (0..10)
        .map(|step| {
            let ids: Vec<u32> = (0..prompts.len()).map(|slot| id(slot, step)).collect();
            batch.decode(&ids).expect("decode")
        })
        .collect()
}

#[test]
fn cuda_a_slot_has_the_logits_of_the_slot_alone() {
    for set in ["a", "d"] {
        let Some(ways) = both(set) else { return };
        for (way, model) in ways {
            let prompts = slot_prompts(8);
            let alone: Vec<_> = (0..8).map(|slot| forced(&model, &prompts[slot..=slot], slot)).collect();
            for slots in 1..=8 {
                let together = forced(&model, &prompts[..slots], 0);
                for (step, logits) in together.iter().enumerate() {
                    for (slot, row) in logits.chunks(logits.len() / slots).enumerate() {
                        let same = bits(row) == bits(&alone[slot][step]);
                        assert!(same, "{set}, {way}: slot {slot} of {slots}, step {step}");
                    }
                }
                assert!(together == forced(&model, &prompts[..slots], 0), "{way}: a second run differs");
            }
        }
    }
}

#[test]
fn cuda_many_slots_have_the_logits_of_the_slots_alone() {
    let Some(model) = model("a").map(Arc::new) else { return };
    let prompts = slot_prompts(64);
    let alone: Vec<_> = (0..64).map(|slot| forced(&model, &prompts[slot..=slot], slot)).collect();
    for slots in [9, 16, 17, 33, 64] {
        let mut worst = 0.0f32;
        for (step, logits) in forced(&model, &prompts[..slots], 0).iter().enumerate() {
            for (slot, row) in logits.chunks(logits.len() / slots).enumerate() {
                worst = worst.max(golden::worst(row, &alone[slot][step]));
            }
        }
        println!("{slots} slots: logits differ by {worst:.2e}");
        assert!(worst <= BATCH_TOLERANCE, "{slots} slots");
    }
}

/// Norms beyond f16 leave a step's inputs without numbers: that is said of the logits, and no block waits for what is never written.
#[test]
fn cuda_inputs_beyond_f16_make_logits_no_numbers() {
    let folder = std::env::temp_dir().join(format!("peregrine-beyond-{}", std::process::id()));
    golden::edited(golden::model_path("a").as_ref(), &folder, |name, values| {
        if name.ends_with("h.1.input_layernorm.weight") {
            values.chunks_exact_mut(2).for_each(|half| half.copy_from_slice(&0x7bff_u16.to_le_bytes()));
        }
    });
    let load = || CudaModel::load(&Checkpoint::open(folder.to_str().expect("UTF-8"))?, 0, None);
    let loaded = golden::unless_no_gpu(load());
    std::fs::remove_dir_all(&folder).expect("folder");
    let Some(model) = loaded.map(Arc::new) else { return };
    for slots in [1, 2, 4, 5, 8] {
        for (step, logits) in forced(&model, &slot_prompts(slots), 0).iter().enumerate() {
            assert!(logits.iter().all(|logit| logit.is_nan()), "{slots} slots, step {step}");
        }
    }
}

#[test]
fn cuda_a_batch_gives_each_slot_its_tokens() {
    let Some(ways) = both("a") else { return };
    for (way, model) in ways {
        let prompts = slot_prompts(8);
        for sampling in settings() {
            // An id that some answers hold early and others not at all.
            let stop_ids = [answer(&model, &prompts[3], &sampling, &[])[20].id];
            let alone: Vec<_> = prompts.iter().map(|ids| answer(&model, ids, &sampling, &stop_ids)).collect();
            for slots in [1, 2, 5, 8] {
                let mut batch = batch(&model, &prompts[..slots]);
                let histories: Vec<&[u32]> = prompts[..slots].iter().map(Vec::as_slice).collect();
                batch.begin(&sampling, &stop_ids, &histories).expect("begin");
                let mut given = vec![Vec::new(); slots];
                loop {
                    let tokens = batch.next_step().expect("next_step");
                    if tokens.iter().all(Option::is_none) {
                        break;
                    }
                    tokens.into_iter().zip(&mut given).for_each(|(token, given)| given.extend(token));
                }
                assert_eq!(given, alone[..slots], "{way}, {slots} slots, {sampling:?}");
            }
        }
    }
}

/// Steps of short contexts are captured apart. A text that grows out of these has the same tokens, to the last bit of their probabilities, as
/// in a batch whose steps are for any context from the start.
#[test]
fn cuda_a_text_grows_out_of_short_contexts() {
    let Some(model) = model("a").map(Arc::new) else { return };
    let long: Vec<u32> = golden::goldens("a")[2].ids.iter().copied().cycle().take(800).collect();
    let sampling = Sampling { ignore_eos: true, ..Sampling::greedy().max_new_tokens(40) };
    let given = |last: usize| {
        let lengths = [30, ATTN_SHORT - 20, 64, 7, 128, 400, 1, 65, 300, last];
        let prompts = lengths.map(|length| long[..length].to_vec());
        let mut batch = CudaBatch::new(Arc::clone(&model), prompts.len(), 1024).expect("batch");
        let mut given = vec![Vec::new(); prompts.len()];
        // Again with what was captured.
        for _ in 0..2 {
            for (slot, ids) in prompts.iter().enumerate() {
                batch.rewind(slot, 0).expect("rewind");
                batch.prefill(slot, ids).expect("prefill");
            }
            let histories: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            batch.begin(&sampling, &[], &histories).expect("begin");
            for _ in 0..40 {
                let tokens = batch.next_step().expect("next_step");
                tokens.iter().zip(&mut given).for_each(|(token, given)| {
                    given.push(token.map(|token| (token.id, token.logprob.to_bits())));
                });
            }
        }
        given
    };
    let (grown, long) = (given(8), given(ATTN_SHORT + 60));
    for (slot, (grown, long)) in grown[..9].iter().zip(&long).enumerate() {
        assert!(grown.iter().all(Option::is_some), "slot {slot}");
        assert!(grown[..40] == grown[40..], "slot {slot}: the second time differs");
        assert!(grown == long, "slot {slot}: {grown:?}, beside a long text {long:?}");
    }
}

/// A slot that rests keeps its cache, whatever the others do meanwhile.
#[test]
fn cuda_a_slot_that_rests_keeps_its_cache() {
    let Some(ways) = both("a") else { return };
    for (way, model) in ways {
        let prompts = slot_prompts(3);
        let sampling = &settings()[0];
        let mut batch = batch(&model, &prompts);
        let mut histories: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        histories[1] = &[];
        batch.begin(sampling, &[], &histories).expect("begin");
        for step in 0..20 {
            let tokens = batch.next_step().expect("next_step");
            assert_eq!(tokens.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true], "{step}");
        }
        assert_eq!([0, 1, 2].map(|slot| batch.position(slot)), [20, 63, 83]);
        // The cache alone decides what follows one more token.
        batch.prefill(1, &[9]).expect("prefill");
        let history = [prompts[1].as_slice(), &[9]].concat();
        batch.begin(sampling, &[], &[&[], &history, &[]]).expect("begin");
        let given: Vec<_> = (0..20).map(|_| batch.next_step().expect("next_step")[1]).collect();
        let mut timeline = CudaTimeline::new(Arc::clone(&model), CONTEXT).expect("timeline");
        timeline.prefill(&prompts[1]).expect("prefill");
        timeline.prefill(&[9]).expect("prefill");
        timeline.begin(sampling, &[], &history).expect("begin");
        let want: Vec<_> = (0..20).map(|_| Some(timeline.next_token().expect("token"))).collect();
        assert_eq!(given, want, "{way}");
    }
}

#[test]
fn cuda_batches_refuse_what_they_cannot_do() {
    let Some(model) = model("a").map(Arc::new) else { return };
    let refused = |result: Result<()>, wanted: &str| match result {
        Err(Error::Usage(what)) => assert!(what.contains(wanted), "{what}"),
        other => panic!("wanted Error::Usage ({wanted}), got {other:?}"),
    };
    let new = |slots, context| CudaBatch::new(Arc::clone(&model), slots, context).map(|_| ());
    refused(new(0, 16), "wanted 1 to 64");
    refused(new(65, 16), "wanted 1 to 64");
    refused(new(2, 4096), "context size");
    let mut batch = CudaBatch::new(Arc::clone(&model), 2, 16).expect("batch");
    let greedy = Sampling::greedy();
    assert_eq!(batch.next_step().expect("no generation"), [None, None]);
    refused(batch.prefill(2, &[1]), "slot 2");
    refused(batch.prefill(0, &[1; 17]), "do not fit");
    refused(batch.prefill(0, &[4096]), "vocabulary");
    refused(batch.begin(&greedy, &[], &[&[1], &[]]), "prefill first");
    refused(batch.begin(&greedy, &[], &[&[1]]), "1 histories for 2 slots");
    batch.prefill(0, &[1; 16]).expect("a full slot");
    batch.prefill(1, &[1]).expect("prefill");
    refused(batch.begin(&greedy, &[], &[&[], &[1]]), "cannot rest");
    batch.begin(&greedy, &[], &[&[1; 16], &[1]]).expect("begin");
    assert!(batch.next_step().expect("next_step").iter().all(Option::is_some));
    let second = batch.next_step().expect("next_step");
    assert!(second[0].is_none() && second[1].is_some(), "the full slot has its one token");
    refused(batch.rewind(1, 9), "holds");
    refused(batch.decode(&[1, 1]).map(|_| ()), "do not fit");
}
