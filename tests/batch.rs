//! Batches: every text gets the tokens a session of its own gives it, on either device.

#![allow(clippy::expect_used, clippy::panic, reason = "a test's helper fails by panicking")]

mod golden;

use peregrine::engine::{Batch, Device, Engine, SessionOptions};
use peregrine::sampler::Sampling;
use peregrine::{Error, Result};

const OPTIONS: SessionOptions = SessionOptions { max_context: Some(128) };

fn engines() -> Vec<Engine> {
    let cpu = golden::load("a", Device::Cpu).expect("the CPU device");
    let gpu = golden::unless_no_gpu(golden::load("a", Device::Cuda(0)));
    std::iter::once(cpu).chain(gpu).collect()
}

/// The ids of all slots' answers.
fn answers(batch: &mut Batch, prompts: &[&[u32]], sampling: &Sampling) -> Vec<Vec<u32>> {
    batch.begin(prompts, sampling).expect("begin");
    let mut answers = vec![Vec::new(); prompts.len()];
    loop {
        let tokens = batch.next_step().expect("next_step");
        if tokens.iter().all(Option::is_none) {
            return answers;
        }
        for (token, answer) in tokens.into_iter().zip(&mut answers) {
            answer.extend(token.map(|token| token.id));
        }
    }
}

fn alone(engine: &Engine, prompt: &[u32], sampling: &Sampling) -> Vec<u32> {
    if prompt.is_empty() {
        return Vec::new();
    }
    let mut session = engine.session(OPTIONS).expect("session");
    let answer = session.generate_ids(prompt, sampling).expect("generate");
    answer.map(|token| token.expect("token").id).collect()
}

#[test]
fn each_text_gets_the_tokens_of_a_session_of_its_own() {
    let goldens = golden::goldens("a");
    let long = &goldens[2].ids;
    let prompts: [&[u32]; 5] = [&goldens[0].ids, &long[..1], &[], &long[..100], &long[..128]];
    for engine in engines() {
        let mut batch = engine.batch(prompts.len(), OPTIONS).expect("batch");
        assert_eq!(batch.slots(), 5);
        for sampling in [
            Sampling::greedy().max_new_tokens(48),
            Sampling { ignore_eos: true, ..Sampling::greedy().max_new_tokens(40) },
            Sampling::greedy().max_new_tokens(1),
            Sampling::default()
                .temperature(0.8)
                .top_p(0.9)
                .seed(5)
                .repetition_penalty(1.1)
                .max_new_tokens(40),
        ] {
            let want: Vec<_> = prompts.iter().map(|prompt| alone(&engine, prompt, &sampling)).collect();
            assert_eq!(
                answers(&mut batch, &prompts, &sampling),
                want,
                "{} {sampling:?}",
                engine.device_name()
            );
            // What was before leaves no trace, and speculation is for single texts.
            let again = answers(&mut batch, &prompts, &sampling.clone().speculate(true));
            assert_eq!(again, want, "{}", engine.device_name());
        }
        assert_eq!(batch.next_step().expect("after the end"), [None; 5]);
    }
}

#[test]
fn a_batch_refuses_what_it_cannot_do() {
    let refused = |result: Result<()>, wanted: &str| match result {
        Err(Error::Usage(what)) => assert!(what.contains(wanted), "{what}"),
        other => panic!("wanted Error::Usage ({wanted}), got {other:?}"),
    };
    for engine in engines() {
        refused(engine.batch(0, OPTIONS).map(|_| ()), "wanted 1 to 64");
        refused(engine.batch(65, OPTIONS).map(|_| ()), "wanted 1 to 64");
        refused(engine.batch(2, SessionOptions { max_context: Some(0) }).map(|_| ()), "context");
        let mut batch = engine.batch(2, OPTIONS).expect("batch");
        assert!(format!("{batch:?}").starts_with("Batch(2 texts of 128 tokens"));
        assert_eq!(batch.next_step().expect("nothing begun"), [None, None]);
        let greedy = Sampling::greedy();
        refused(batch.begin(&[&[1]], &greedy), "1 prompts for 2 slots");
        refused(batch.begin(&[&[1], &[4096]], &greedy), "prompt 1: id 4096");
        refused(batch.begin(&[&[1; 129], &[1]], &greedy), "prompt 0: 129 tokens");
        refused(batch.begin(&[&[1], &[1]], &greedy.clone().stop("x")), "stop strings");
        refused(batch.begin(&[&[1], &[1]], &greedy.temperature(-1.0)), "temperature");
    }
}
