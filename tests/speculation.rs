//! Speculation on the CPU device: the tokens of plain decoding, in fewer steps where a text repeats itself.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helper fails by panicking")]

mod golden;

use peregrine::Result;
use peregrine::engine::{Device, Engine, GenerationStats, SessionOptions, StopReason, Token};
use peregrine::sampler::Sampling;

fn engine() -> Engine {
    golden::load("a", Device::Cpu).unwrap()
}

/// What an answer came to.
#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<Token>,
    stop: Option<StopReason>,
    /// The session's tokens afterwards.
    kept: Vec<u32>,
}

fn answer(engine: &Engine, ids: &[u32], context: usize, sampling: &Sampling) -> (Answer, GenerationStats) {
    let mut session = engine.session(SessionOptions { max_context: Some(context) }).unwrap();
    let mut generation = session.generate_ids(ids, sampling).unwrap();
    let tokens: Vec<Token> = generation.by_ref().collect::<Result<_>>().unwrap();
    let (stop, stats) = (generation.stop_reason(), generation.stats());
    (Answer { tokens, stop, kept: session.tokens().to_vec() }, stats)
}

/// Both ways; asserts that they are the same, and gives the answer and the figures of speculation.
fn compare(engine: &Engine, ids: &[u32], context: usize, sampling: &Sampling) -> (Answer, GenerationStats) {
    let (plain, without) = answer(engine, ids, context, sampling);
    let (speculated, with) = answer(engine, ids, context, &sampling.clone().speculate(true));
    assert_eq!(speculated, plain, "{sampling:?}");
    assert_eq!((without.drafts, without.accepted_drafts), (0, 0));
    assert_eq!(without.decode_steps, without.new_tokens - 1);
    assert_eq!(with.decode_steps + with.accepted_drafts, with.new_tokens - 1);
    assert!(with.accepted_drafts <= with.drafts);
    (plain, with)
}

/// Prompts of all kinds; the last ones repeat themselves.
fn prompts(engine: &Engine) -> Vec<Vec<u32>> {
    let mut prompts: Vec<Vec<u32>> = golden::goldens("a").into_iter().map(|golden| golden.ids).collect();
    prompts.remove(2); // the long one takes a minute
    let song = "The fox said no. The crow said no. The fox said yes. The crow said yes. The fox said";
    prompts.push(engine.tokenizer().unwrap().encode(song, false).unwrap());
    prompts.push([100, 200].repeat(6));
    prompts
}

#[test]
fn speculation_changes_no_token() {
    let engine = engine();
    let greedy = Sampling { ignore_eos: true, ..Sampling::greedy().max_new_tokens(72) };
    let sampled = Sampling { temperature: 0.6, ..greedy.clone() };
    let settings = [
        greedy.clone(),
        greedy.clone().repetition_penalty(1.15),
        greedy.no_repeat_ngram_size(4),
        sampled.clone().seed(3),
        sampled.clone().seed(4).top_k(5).repetition_penalty(1.1),
        sampled.clone().top_k(0).top_p(0.8).no_repeat_ngram_size(5),
        sampled.temperature(0.3).min_p(0.05).seed(5),
    ];
    let (mut tokens, mut drafts, mut accepted) = (0, 0, 0);
    for ids in prompts(&engine) {
        for sampling in &settings {
            let (_, stats) = compare(&engine, &ids, 512, sampling);
            tokens += stats.new_tokens;
            drafts += stats.drafts;
            accepted += stats.accepted_drafts;
        }
    }
    println!("{tokens} tokens, {accepted} of {drafts} drafts right");
    assert!(tokens > 2000 && accepted > tokens / 10 && drafts > accepted);
}

#[test]
fn a_text_that_repeats_itself_takes_fewer_steps() {
    let engine = engine();
    let sampling = Sampling { ignore_eos: true, ..Sampling::greedy().max_new_tokens(160) };
    let song = &prompts(&engine)[3];
    let (_, stats) = compare(&engine, song, 512, &sampling);
    println!("{} steps for {} tokens", stats.decode_steps, stats.new_tokens);
    assert!(4 * stats.decode_steps < stats.new_tokens, "{stats:?}");
}

#[test]
fn answers_end_where_they_ended() {
    let engine = engine();
    let prompts = prompts(&engine);
    let mut stops = Vec::new();
    for ids in &prompts {
        for (context, sampling) in [
            (512, Sampling::greedy().max_new_tokens(64)),
            (ids.len() + 21, Sampling { ignore_eos: true, ..Sampling::greedy() }),
            (ids.len(), Sampling::greedy()),
            (512, Sampling::greedy().max_new_tokens(48).stop(" fox")),
            (512, Sampling::greedy().max_new_tokens(1)),
            (512, Sampling::greedy().max_new_tokens(2)),
        ] {
            stops.push(compare(&engine, ids, context, &sampling).0.stop.unwrap());
        }
    }
    for stop in
        [StopReason::EndOfText, StopReason::StopString, StopReason::MaxNewTokens, StopReason::ContextFull]
    {
        assert!(stops.contains(&stop), "no answer ended by {stop:?}");
    }
}

#[test]
fn a_turn_after_a_speculated_one_sees_what_was_yielded() {
    let engine = engine();
    let ids = [100, 200].repeat(6);
    let run = |speculate: bool| -> Vec<Vec<u32>> {
        let mut session = engine.session(SessionOptions::default()).unwrap();
        let sampling = Sampling { ignore_eos: true, ..Sampling::greedy().max_new_tokens(24) };
        let sampling = sampling.speculate(speculate);
        let mut turns = Vec::new();
        // Dropped early: drafts that were right but not handed out must go.
        for taken in [24, 1, 3, 10, 24] {
            let turn = session.generate_ids(&ids, &sampling).unwrap().take(taken);
            turns.push(turn.map(|token| token.unwrap().id).collect());
        }
        turns.push(session.tokens().to_vec());
        turns
    };
    assert_eq!(run(true), run(false));
}
