//! Engine, sessions and generations on the CPU device: every way an answer ends, and what a session keeps.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helper fails by panicking")]

mod golden;

use std::sync::Arc;

use peregrine::checkpoint::Checkpoint;
use peregrine::cpu::{CpuModel, CpuTimeline};
use peregrine::engine::{Device, Engine, LoadOptions, SessionOptions, StopReason, Token};
use peregrine::sampler::Sampling;
use peregrine::{Error, Result};

const CPU: LoadOptions = LoadOptions { device: Device::Cpu, progress: None };
const CARD: &str =
    "A helpful assistant who helps the user with any questions asked.\nUser: Tell me about AI\nAssistant:";

fn engine() -> Engine {
    golden::load("a", Device::Cpu).unwrap()
}

fn with_context(max_context: usize) -> SessionOptions {
    SessionOptions { max_context: Some(max_context) }
}

fn greedy(max_new_tokens: usize) -> Sampling {
    Sampling::greedy().max_new_tokens(max_new_tokens)
}

fn all_of(answer: impl Iterator<Item = Result<Token>>) -> Vec<Token> {
    answer.collect::<Result<_>>().unwrap()
}

fn joined(tokens: &[Token]) -> String {
    tokens.iter().map(|token| token.text.as_str()).collect()
}

fn ids_of(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

/// What `Result::unwrap_err` needs of the other side, a generation does not have.
fn usage_of<T>(result: Result<T>) -> String {
    match result {
        Err(Error::Usage(what)) => what,
        Err(other) => panic!("wanted Error::Usage, got {other:?}"),
        Ok(_) => panic!("wanted Error::Usage"),
    }
}

#[test]
fn an_answer_ends_at_max_new_tokens() {
    let engine = engine();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut answer = session.generate(CARD, &greedy(10)).unwrap();
    assert_eq!(answer.stop_reason(), None);
    let tokens = all_of(answer.by_ref());
    assert_eq!(answer.stop_reason(), Some(StopReason::MaxNewTokens));
    assert!(answer.next().is_none(), "nothing comes after the end");
    let stats = answer.stats();
    assert_eq!((stats.prompt_tokens, stats.new_tokens), (23, 10));
    assert!(stats.first_token_seconds >= stats.prefill_seconds && stats.prefill_seconds > 0.0);
    assert!(stats.decode_seconds > 0.0 && stats.decode_rate().is_some() && stats.prefill_rate().is_some());
    assert_eq!(joined(&tokens), engine.tokenizer().unwrap().decode(&ids_of(&tokens), true));
    assert!(tokens.iter().all(|token| token.logprob <= 0.0 && token.logprob > -10.0));
    let golden = &golden::goldens("a")[0];
    assert_eq!(session.tokens(), [&golden.ids, &golden.greedy.ids[..10]].concat());
}

#[test]
fn an_answer_ends_at_end_of_text_unless_it_is_ignored() {
    let engine = engine();
    let golden = &golden::goldens("a")[0];
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut answer = session.generate_ids(&golden.ids, &greedy(64)).unwrap();
    let tokens = all_of(answer.by_ref());
    assert_eq!(answer.stop_reason(), Some(StopReason::EndOfText));
    assert_eq!(ids_of(&tokens), golden.greedy.ids[..41], "the goldens have id 11 at index 40");
    assert_eq!((tokens[40].id, tokens[40].text.as_str()), (11, ""));
    assert!(joined(&tokens).ends_with("if you like."));
    assert_eq!(answer.stats().new_tokens, 41);
    let kept = [&golden.ids, &golden.greedy.ids[..40]].concat();
    assert_eq!(session.tokens(), kept, "the next turn follows the answer, not its end");

    let mut session = engine.session(SessionOptions::default()).unwrap();
    let on = Sampling { ignore_eos: true, ..greedy(43) };
    let tokens = all_of(session.generate_ids(&golden.ids, &on).unwrap());
    assert_eq!(ids_of(&tokens), golden.greedy.ids[..43]);
    assert!(joined(&tokens).contains("if you like.A helpful"), "special tokens have no text");
}

#[test]
fn an_answer_ends_at_a_stop_string_which_is_neither_printed_nor_kept() {
    let engine = engine();
    let tokenizer = engine.tokenizer().unwrap();
    let whole = " I know very little about AI, for I am only a very small model";
    for (stop, text) in [
        (" little about", " I know very"),
        ("ttle ab", " I know very li"),
        (" I", ""),
        ("small", " I know very little about AI, for I am only a very "),
    ] {
        let mut session = engine.session(SessionOptions::default()).unwrap();
        let sampling = greedy(64).stop("never to be seen").stop(stop);
        let mut answer = session.generate(CARD, &sampling).unwrap();
        let tokens = all_of(answer.by_ref());
        assert_eq!(answer.stop_reason(), Some(StopReason::StopString), "{stop}");
        assert_eq!(joined(&tokens), text, "{stop}");
        assert!(answer.next().is_none());
        let kept = tokenizer.decode(session.tokens(), true);
        let kept = kept.strip_prefix(CARD).unwrap();
        assert!(whole.starts_with(kept) && kept.starts_with(text.trim_end()), "{stop}: kept {kept:?}");
        assert!(
            kept.len() <= text.len() + "ttle".len(),
            "{stop}: kept {kept:?}, at most the token it begins in"
        );
    }
}

#[test]
fn text_held_back_for_a_stop_string_that_does_not_come_is_printed_at_the_end() {
    let mut session = engine().session(SessionOptions::default()).unwrap();
    let sampling = greedy(4).stop(" very little or nothing");
    let tokens = all_of(session.generate(CARD, &sampling).unwrap());
    assert_eq!(joined(&tokens), " I know very little");
    assert_eq!(tokens[2].text, "", "might have been the stop string");
    assert_eq!(tokens[3].text, " very little");
}

#[test]
fn a_prompt_may_fill_the_context_and_gets_what_room_is_left() {
    let engine = engine();
    let ids = &golden::goldens("a")[0].ids; // 23 tokens
    for (max_context, new_tokens) in [(25, 3), (24, 2), (23, 1)] {
        let mut session = engine.session(with_context(max_context)).unwrap();
        assert_eq!(session.max_context(), max_context);
        let mut answer = session.generate_ids(ids, &greedy(10)).unwrap();
        let tokens = all_of(answer.by_ref());
        assert_eq!((tokens.len(), answer.stop_reason()), (new_tokens, Some(StopReason::ContextFull)));
        assert_eq!(session.tokens().len(), max_context + 1, "the last one is known, but not in the cache");
        let refused = usage_of(session.generate_ids(&[100], &greedy(1)));
        assert!(refused.contains(&format!("holds {max_context}")), "{refused}");
        session.reset().unwrap();
        assert!(session.tokens().is_empty());
        assert!(session.generate_ids(ids, &greedy(1)).is_ok());
    }
    let mut session = engine.session(with_context(22)).unwrap();
    let refused = usage_of(session.generate_ids(ids, &greedy(1)));
    assert!(refused.contains("23 tokens") && refused.contains("holds 22"), "{refused}");
    assert!(session.tokens().is_empty());
    // Exactly max_new_tokens and exactly full: the caller got all that was asked for.
    let mut session = engine.session(with_context(23)).unwrap();
    let mut answer = session.generate_ids(ids, &greedy(1)).unwrap();
    assert!(answer.next().is_some());
    assert_eq!(answer.stop_reason(), Some(StopReason::MaxNewTokens));
}

#[test]
fn the_context_is_at_most_the_models_positions() {
    let engine = engine();
    assert_eq!(engine.session(SessionOptions::default()).unwrap().max_context(), 2048);
    for max_context in [0, 2049] {
        let refused = usage_of(engine.session(with_context(max_context)));
        assert!(refused.contains(&max_context.to_string()) && refused.contains("2048"), "{refused}");
    }
}

#[test]
fn a_generation_dropped_early_leaves_what_it_has_yielded() {
    let engine = engine();
    let golden = &golden::goldens("a")[0];
    let mut session = engine.session(SessionOptions::default()).unwrap();
    for taken in [0, 1, 3] {
        session.reset().unwrap();
        let yielded = all_of(session.generate_ids(&golden.ids, &greedy(64)).unwrap().take(taken));
        assert_eq!(yielded.len(), taken);
        let so_far = [&golden.ids, &golden.greedy.ids[..taken]].concat();
        assert_eq!(session.tokens(), so_far);
        // The rest of the golden answer, its next token given as the prompt.
        let next = &golden.greedy.ids[taken..];
        let rest = all_of(session.generate_ids(&next[..1], &greedy(5)).unwrap());
        assert_eq!(ids_of(&rest), next[1..6], "after {taken}");
    }
}

#[test]
fn a_second_turn_equals_one_prompt_of_everything() {
    let engine = engine();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    // The first answer ends by itself; its end is not part of the history.
    assert!(session.generate(CARD, &greedy(64)).unwrap().all(|token| token.is_ok()));
    let next_turn = "\nUser: Tell me a story\nAssistant:";
    let history = session.tokens().to_vec();
    let second = all_of(session.generate(next_turn, &greedy(12)).unwrap());

    let everything = [history, engine.tokenizer().unwrap().encode(next_turn, false).unwrap()].concat();
    let mut fresh = engine.session(SessionOptions::default()).unwrap();
    let once = all_of(fresh.generate_ids(&everything, &greedy(12)).unwrap());
    assert_eq!(second, once);
    assert_eq!(session.tokens(), fresh.tokens());
}

#[test]
fn truncate_forgets_the_end() {
    let engine = engine();
    let golden = &golden::goldens("a")[0];
    let mut session = engine.session(SessionOptions::default()).unwrap();
    assert!(session.generate_ids(&golden.ids, &greedy(20)).unwrap().all(|token| token.is_ok()));
    session.truncate(golden.ids.len() + 5).unwrap();
    session.truncate(1000).unwrap();
    assert_eq!(session.tokens(), [&golden.ids, &golden.greedy.ids[..5]].concat());
    let rest = session.generate_ids(&golden.greedy.ids[5..7], &greedy(3)).unwrap();
    assert_eq!(ids_of(&all_of(rest)), golden.greedy.ids[7..10]);
}

#[test]
fn the_seed_decides_the_text() {
    let engine = engine();
    let ids = &golden::goldens("a")[0].ids;
    let sampled = |seed| {
        let sampling = Sampling { temperature: 1.5, top_k: 0, seed, ignore_eos: true, ..greedy(24) };
        golden::generate(&engine, ids, &sampling)
    };
    assert_eq!(sampled(7), sampled(7));
    assert_ne!(sampled(7), sampled(8));
}

#[test]
fn logits_append_to_the_session() {
    let engine = engine();
    let golden = &golden::goldens("a")[0];
    let vocab = engine.config().vocab_size;
    let all = golden::logits(&engine, &golden.ids, false);
    // A prompt, two tokens of an answer (the second is not in the cache yet), then logits of the rest.
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let answer = session.generate_ids(&golden.ids[..10], &greedy(2)).unwrap();
    let answer = ids_of(&all_of(answer));
    let mut rows = 0;
    session.truncate(10).unwrap();
    let mut compare = |logits: &[f32]| {
        assert_eq!(logits, &all[(10 + rows) * vocab..][..vocab], "row {rows}");
        rows += 1;
        Ok(())
    };
    session.logits(&golden.ids[10..15], false, &mut compare).unwrap();
    session.logits(&golden.ids[15..], true, &mut compare).unwrap();
    assert_eq!(rows, 13);
    assert_eq!(session.tokens(), golden.ids);
    let next = session.generate_ids(&golden.greedy.ids[..1], &greedy(1)).unwrap().next();
    assert_eq!(next.unwrap().unwrap().id, golden.greedy.ids[1]);

    // The pending token of an answer comes before the ids asked about, and is not handed out.
    let mut session = engine.session(SessionOptions::default()).unwrap();
    assert_eq!(session.generate_ids(&golden.ids[..10], &greedy(2)).unwrap().count(), 2);
    let mut got = Vec::new();
    let mut collect = |logits: &[f32]| {
        got.extend_from_slice(logits);
        Ok(())
    };
    session.logits(&[100], false, &mut collect).unwrap();
    let whole = golden::logits(&engine, &[&golden.ids[..10], &answer[..], &[100]].concat(), false);
    assert_eq!(got, whole[12 * vocab..]);

    // A sink that fails leaves the tokens as they were.
    let mut fail = |_: &[f32]| Err(Error::Io("disk full".to_owned()));
    assert_eq!(session.logits(&[5, 6], false, &mut fail), Err(Error::Io("disk full".to_owned())));
    assert_eq!(session.tokens().len(), 13);
    got = Vec::new();
    let mut collect = |logits: &[f32]| {
        got.extend_from_slice(logits);
        Ok(())
    };
    session.truncate(12).unwrap();
    session.logits(&[100], false, &mut collect).unwrap();
    assert_eq!(got, whole[12 * vocab..]);
}

#[test]
fn what_cannot_be_asked_is_refused_and_changes_nothing() {
    let engine = engine();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut sink = |_: &[f32]| -> Result<()> { panic!("there are no logits") };
    assert!(usage_of(session.generate("", &greedy(1))).contains("the prompt is empty"));
    assert!(usage_of(session.generate_ids(&[], &greedy(1))).contains("the prompt is empty"));
    assert!(usage_of(session.logits(&[], false, &mut sink)).contains("the prompt is empty"));
    let refused = usage_of(session.generate_ids(&[1, 4096], &greedy(1)));
    assert!(refused.contains("4096") && refused.contains("token 1"), "{refused}");
    assert!(usage_of(session.logits(&[u32::MAX], true, &mut sink)).contains("4294967295"));
    usage_of(session.generate("text", &Sampling { temperature: f32::NAN, ..greedy(1) }));
    usage_of(session.generate("text", &greedy(0)));
    assert!(session.tokens().is_empty());
    assert!(session.generate("text", &greedy(1)).is_ok());
}

/// The built-in model's files without the tokenizer.
fn without_tokenizer() -> Checkpoint {
    let read = |name: &'static str| {
        let bytes = std::fs::read(format!("{}/{name}", golden::model_path("a"))).unwrap();
        (name, &*bytes.leak())
    };
    let files = [read("config.json"), read("quantize_config.json"), read("model.safetensors")];
    Checkpoint::from_static("no-tokenizer", &files).unwrap()
}

#[test]
fn ids_work_without_a_tokenizer_and_text_says_what_is_missing() {
    let engine = Engine::from_checkpoint(without_tokenizer(), &CPU).unwrap();
    assert!(matches!(engine.tokenizer(), Err(Error::Model { .. })));
    let golden = &golden::goldens("a")[0];
    let mut session = engine.session(SessionOptions::default()).unwrap();
    assert!(matches!(session.generate("text", &greedy(1)), Err(Error::Model { .. })));
    assert!(matches!(session.generate_ids(&golden.ids, &greedy(1).stop("x")), Err(Error::Model { .. })));
    assert!(session.tokens().is_empty());
    let mut answer = session.generate_ids(&golden.ids, &greedy(64)).unwrap();
    let tokens = all_of(answer.by_ref());
    assert_eq!(answer.stop_reason(), Some(StopReason::EndOfText));
    assert_eq!(ids_of(&tokens), golden.greedy.ids[..41]);
    assert_eq!(joined(&tokens), "");
}

#[test]
fn the_device_is_named_and_a_fallback_explained() {
    let engine = engine();
    assert!(engine.device_name().starts_with("cpu (reference, "), "{}", engine.device_name());
    assert_eq!(engine.fallback_reason(), None, "the CPU was asked for");
    let auto = golden::load("a", Device::Auto).unwrap();
    match auto.fallback_reason() {
        Some(reason) => {
            assert!(auto.device_name().starts_with("cpu"), "{}", auto.device_name());
            assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
            let error = golden::load("a", Device::Cuda(0)).unwrap_err();
            assert_eq!(
                error,
                Error::NoGpu(reason.to_owned()),
                "asking for the GPU fails for the same reason"
            );
        }
        None => assert!(!auto.device_name().starts_with("cpu"), "{}", auto.device_name()),
    }
    assert!(matches!(Engine::load("no/such/model", &CPU), Err(Error::Model { .. })));
}

#[test]
fn memory_is_what_the_files_and_the_cache_take() {
    let memory = engine().memory();
    let file = std::fs::metadata(format!("{}/model.safetensors", golden::model_path("a"))).unwrap().len();
    // The file holds a header, g_idx and zero biases besides.
    assert!(memory.weight_bytes < file && memory.weight_bytes > file / 2, "{memory:?} of {file}");
    assert_eq!(memory.kv_bytes_per_token, 8 * 2 * 64 * 4, "8 layers, key and value of 64, f32");
    assert_eq!(memory.gpu_used_bytes, None);
}

#[test]
fn sessions_of_one_engine_run_side_by_side() {
    let engine = engine();
    let golden = &golden::goldens("a")[0];
    let answers: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let run = || golden::generate(&engine.clone(), &golden.ids, &greedy(12));
        let threads = [scope.spawn(run), scope.spawn(run)];
        threads.map(|thread| thread.join().unwrap()).into()
    });
    assert_eq!(answers, [&golden.greedy.ids[..12], &golden.greedy.ids[..12]]);
}

#[test]
fn a_timeline_refuses_calls_out_of_order() {
    let checkpoint = Checkpoint::open(&golden::model_path("a")).unwrap();
    let mut timeline = CpuTimeline::new(Arc::new(CpuModel::load(Arc::new(checkpoint)).unwrap()), 4).unwrap();
    assert!(usage_of(timeline.next_token()).contains("begin"));
    timeline.begin(&Sampling::greedy(), &[], &[]).unwrap();
    assert!(usage_of(timeline.next_token()).contains("no logits"));
    usage_of(timeline.prefill(&[]));
    usage_of(timeline.prefill(&[1, 2, 3, 4, 5]));
    usage_of(timeline.rewind(1));
    timeline.prefill(&[12, 13, 14]).unwrap();
    assert!(usage_of(timeline.begin(&Sampling::greedy(), &[], &[12])).contains("history of 1"));
    timeline.begin(&Sampling::greedy(), &[], &[12, 13, 14]).unwrap();
    let chosen = timeline.next_token().unwrap();
    assert_eq!(timeline.position(), 3, "the chosen token waits");
    timeline.next_token().unwrap();
    assert_eq!(timeline.position(), 4);
    assert!(usage_of(timeline.next_token()).contains("full"));
    // Back to the prompt: the logits are gone, and come again with the last token.
    timeline.rewind(2).unwrap();
    timeline.begin(&Sampling::greedy(), &[], &[12, 13]).unwrap();
    assert!(usage_of(timeline.next_token()).contains("no logits"));
    timeline.prefill(&[14]).unwrap();
    timeline.begin(&Sampling::greedy(), &[], &[12, 13, 14]).unwrap();
    assert_eq!(timeline.next_token().unwrap(), chosen);
}

#[test]
fn an_engine_may_be_shared_between_threads() {
    fn shared<T: Send + Sync + Clone>() {}
    fn movable<T: Send>() {}
    shared::<Engine>();
    movable::<peregrine::engine::Session>();
}
