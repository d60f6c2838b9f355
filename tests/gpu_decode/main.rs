//! Decode steps on the GPU with the small models: the persistent kernel and one kernel an op, speculation, threads;
//! batches in `batch.rs`.
//!
//! This is also the test of the op `decode_step`: its reference is the whole model, by goldens and by the ops one by one.
//! Without a GPU each test prints why it was skipped; with PEREGRINE_REQUIRE_GPU=1 it fails instead.

#![cfg(feature = "cuda")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test's helper fails by panicking")]

mod batch;
#[path = "../golden/mod.rs"]
mod golden;

use std::sync::Arc;

use peregrine::checkpoint::Checkpoint;
use peregrine::cuda::{CudaModel, CudaTimeline};
use peregrine::engine::{Device, Engine, GenerationStats, SessionOptions, StopReason};
use peregrine::sampler::{Sampled, Sampling};
use peregrine::{Error, Result};

/// Largest difference of a logit from Hugging Face's f32 ones, as in tests/gpu_model.rs.
const LOGIT_TOLERANCE: f32 = 0.041;
/// Largest difference between logits of the persistent kernel and of one kernel an op: two roundings of the same sums, each at
/// most LOGIT_TOLERANCE from the truth. Measured on an H200: 0.0348.
const STEP_TOLERANCE: f32 = 0.041;
/// Positions of the tests' sequences.
const CONTEXT: usize = 512;

/// The model; on GPUs that `decode_step` is written for, decoded by it.
fn model(set: &str) -> Option<CudaModel> {
    let load = || CudaModel::load(&Checkpoint::open(&golden::model_path(set))?, 0, None);
    let model = golden::unless_no_gpu(load())?;
    let why_not = model.why_not_persistent();
    println!("{}: {}", model.device_name(), why_not.unwrap_or("persistent decode steps"));
    let hopper = ["H100", "H200"].iter().any(|name| model.device_name().contains(name));
    let switched = std::env::var_os("PEREGRINE_NO_PERSISTENT").is_some();
    assert!(!hopper || switched || why_not.is_none(), "{why_not:?}");
    Some(model)
}

/// The model as it comes, and decoded by one kernel an op.
fn both(set: &str) -> Option<[(&'static str, Arc<CudaModel>); 2]> {
    let (persistent, per_op) = (model(set)?, model(set)?.without_persistent());
    Some([("persistent", Arc::new(persistent)), ("one kernel an op", Arc::new(per_op))])
}

fn stepwise(model: &Arc<CudaModel>, ids: &[u32]) -> Vec<f32> {
    let mut timeline = CudaTimeline::new(Arc::clone(model), ids.len()).expect("timeline");
    let mut all = Vec::new();
    let mut sink = |logits: &[f32]| {
        all.extend_from_slice(logits);
        Ok(())
    };
    timeline.logits(ids, true, &mut sink).expect("logits");
    all
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// Prompts of all kinds; the last two repeat themselves.
fn prompts() -> Vec<Vec<u32>> {
    let mut prompts: Vec<Vec<u32>> = golden::goldens("a").into_iter().map(|golden| golden.ids).collect();
    let long = prompts[2].clone();
    prompts.push(long[..17].repeat(5));
    prompts.push([100, 200].repeat(6));
    prompts
}

/// How tokens are chosen in the comparisons.
fn settings() -> Vec<Sampling> {
    let greedy = Sampling { ignore_eos: true, ..Sampling::greedy().max_new_tokens(72) };
    let sampled = Sampling { temperature: 0.6, ..greedy.clone() };
    vec![
        greedy.clone(),
        greedy.clone().repetition_penalty(1.15),
        greedy.no_repeat_ngram_size(4),
        sampled.clone().seed(3),
        sampled.clone().seed(4).top_k(5).repetition_penalty(1.1),
        sampled.top_k(0).top_p(0.8).no_repeat_ngram_size(5),
    ]
}

/// An answer of a timeline, until the generation ends.
fn answer(model: &Arc<CudaModel>, ids: &[u32], sampling: &Sampling, stop_ids: &[u32]) -> Vec<Sampled> {
    let mut timeline = CudaTimeline::new(Arc::clone(model), CONTEXT).expect("timeline");
    timeline.prefill(ids).expect("prefill");
    timeline.begin(sampling, stop_ids, ids).expect("begin");
    let mut tokens = Vec::new();
    loop {
        match timeline.next_token() {
            Ok(token) => tokens.push(token),
            Err(Error::Usage(_)) => return tokens,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn cuda_steps_match_hugging_face_either_way() {
    for set in ["a", "d"] {
        let Some(ways) = both(set) else { return };
        for (way, model) in ways {
            golden::check_logits_of(set, way, LOGIT_TOLERANCE, |ids| stepwise(&model, ids));
        }
    }
}

#[test]
fn cuda_persistent_steps_are_those_of_the_ops_one_by_one() {
    for set in ["a", "d"] {
        let Some([(_, persistent), (_, per_op)]) = both(set) else { return };
        for ids in prompts() {
            let difference = golden::worst(&stepwise(&persistent, &ids), &stepwise(&per_op, &ids));
            println!("{set}, {} tokens: logits differ by {difference:.2e}", ids.len());
            assert!(difference <= STEP_TOLERANCE);
        }
    }
}

#[test]
fn cuda_steps_are_bit_identical_from_run_to_run() {
    for set in ["a", "d"] {
        let Some(ways) = both(set) else { return };
        for (way, model) in ways {
            let ids = &golden::goldens(set)[2].ids;
            let first = bits(&stepwise(&model, ids));
            for run in 1..4 {
                assert!(first == bits(&stepwise(&model, ids)), "{set}, {way}: run {run} differs");
            }
        }
    }
}

#[test]
fn cuda_speculation_changes_no_token() {
    let Some(ways) = both("a") else { return };
    for (way, model) in ways {
        for ids in prompts() {
            for sampling in settings() {
                let plain = answer(&model, &ids, &sampling, &[]);
                assert_eq!(plain.len(), 72, "{way}");
                let speculated = answer(&model, &ids, &sampling.clone().speculate(true), &[]);
                assert_eq!(speculated, plain, "{way}, {} tokens, {sampling:?}", ids.len());
            }
        }
    }
}

/// The ends of an answer, what the session keeps, and the turn that follows.
#[test]
fn cuda_speculated_answers_end_where_they_ended() {
    let Some(engine) = golden::unless_no_gpu(golden::load("a", Device::Cuda(0))) else { return };
    let run = |ids: &[u32], context: usize, sampling: &Sampling| {
        let options = SessionOptions { max_context: Some(context) };
        let mut session = engine.session(options).expect("session");
        let mut generation = session.generate_ids(ids, sampling).expect("generate");
        let tokens: Vec<_> = generation.by_ref().collect::<Result<_>>().expect("tokens");
        let (stop, stats) = (generation.stop_reason(), generation.stats());
        let kept = session.tokens().to_vec();
        let next = if context == CONTEXT { second_turn(&mut session, sampling) } else { Vec::new() };
        ((tokens, stop, kept, next), stats)
    };
    let mut accepted = 0;
    for ids in prompts() {
        let free = Sampling { ignore_eos: true, ..Sampling::greedy() };
        for (context, sampling) in [
            (CONTEXT, Sampling::greedy().max_new_tokens(64)),
            (CONTEXT, free.clone().max_new_tokens(100)),
            (ids.len() + 21, free),
            (ids.len(), Sampling::greedy()),
            (CONTEXT, Sampling::greedy().max_new_tokens(1)),
            (CONTEXT, Sampling::greedy().max_new_tokens(2)),
        ] {
            let (plain, _): (_, GenerationStats) = run(&ids, context, &sampling);
            let (speculated, stats) = run(&ids, context, &sampling.clone().speculate(true));
            assert_eq!(speculated, plain, "{sampling:?}");
            assert!(plain.1.is_some_and(|stop| stop != StopReason::StopString));
            assert_eq!(stats.decode_steps + stats.accepted_drafts, stats.new_tokens - 1);
            accepted += stats.accepted_drafts;
        }
    }
    println!("{accepted} drafts were right");
}

fn second_turn(session: &mut peregrine::engine::Session, sampling: &Sampling) -> Vec<u32> {
    let answer = session.generate_ids(&[100, 200, 100], sampling).expect("a second turn");
    answer.map(|token| token.expect("token").id).collect()
}

/// Sessions on several threads share a stream; none may disturb another.
#[test]
fn cuda_sessions_on_several_threads_give_their_own_tokens() {
    let Some(engine) = golden::unless_no_gpu(golden::load("a", Device::Cuda(0))) else { return };
    let run = |engine: &Engine, thread: usize| -> Vec<Vec<u32>> {
        let prompts = prompts();
        let prompt = &prompts[thread % prompts.len()];
        let settings = settings();
        // Each answer captures a step anew, while others work.
        settings
            .iter()
            .map(|sampling| {
                golden::generate(engine, prompt, &sampling.clone().speculate(thread.is_multiple_of(2)))
            })
            .collect()
    };
    let want: Vec<_> = (0..6).map(|thread| run(&engine, thread)).collect();
    let got: Vec<_> = std::thread::scope(|scope| {
        let engine = &engine;
        let threads: Vec<_> = (0..6).map(|thread| scope.spawn(move || run(engine, thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread")).collect()
    });
    assert_eq!(got, want);
}
