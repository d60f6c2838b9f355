//! sample, start: the same tokens as `src/sampler.rs`, over many seeds, histories and settings; several rows the same as one by one,
//! with the drafts of `src/speculate.rs`.

use peregrine::gpu::ops::{self, STEP_FIRST, STEP_TOKENS, SamplerShape, SamplerState};
use peregrine::gpu::{DevBuf, Gpu, Stream};
use peregrine::sampler::{self, Sampling};
use peregrine::speculate::{self, Pace};

use crate::kit::*;

/// Log probabilities: f32 sums of 65024 terms against f64. Measured: 9.5e-7.
const LOGPROB_TOLERANCE: f32 = 3e-6;

fn settings() -> Vec<Sampling> {
    let greedy = Sampling::default();
    let sampled = Sampling { temperature: 0.8, top_k: 0, ..Sampling::default() };
    vec![
        greedy.clone(),
        Sampling { repetition_penalty: 1.3, ..greedy.clone() },
        Sampling { no_repeat_ngram_size: 2, ..greedy.clone() },
        Sampling { repetition_penalty: 1.15, no_repeat_ngram_size: 3, ..greedy },
        sampled.clone(),
        Sampling { top_k: 50, ..sampled.clone() },
        Sampling { top_k: 1, ..sampled.clone() },
        Sampling { top_k: 300, top_p: 0.9, ..sampled.clone() },
        Sampling { top_k: 500, ..sampled.clone() },
        Sampling { top_k: 1000, top_p: 0.95, ..sampled.clone() },
        Sampling { top_p: 0.9, ..sampled.clone() },
        Sampling { top_p: 0.05, ..sampled.clone() },
        Sampling { min_p: 0.1, ..sampled.clone() },
        Sampling { temperature: 0.7, top_k: 50, top_p: 0.95, repetition_penalty: 1.15, ..sampled.clone() },
        Sampling { temperature: 3.0, top_p: 0.99, min_p: 0.001, no_repeat_ngram_size: 1, ..sampled },
    ]
}

fn single(vocab: usize, rows: usize, max_context: usize) -> SamplerShape {
    SamplerShape { slots: 1, rows, vocab, max_context }
}

/// Few distinct ids, so that n-grams do repeat.
fn repetitive(random: &mut Random, length: usize, vocab: usize) -> Vec<u32> {
    (0..length).map(|_| (random.bits() % 9) as u32 * (vocab as u32 / 16).max(1)).collect()
}

#[test]
fn sample_matches_reference() {
    let Some((gpu, stream)) = gpu() else { return };
    for vocab in [16usize, 4096, 65024, 70000] {
        let mut state = SamplerState::new(&gpu, &stream, single(vocab, 1, 4096)).unwrap();
        let mut worst = 0f32;
        for (case, setting) in settings().into_iter().enumerate() {
            for trial in 0..6u64 {
                let mut random = Random::new(case as u64 * 1000 + trial);
                let sampling = Sampling { seed: random.bits(), ..setting.clone() };
                let length = [1, 2, 3, 50, 500, 2047][trial as usize];
                let mut history = repetitive(&mut random, length, vocab);
                ops::start(&stream, &mut state, 0, &history).unwrap();
                // Several tokens in a row: the state, history and set of seen ids must advance too.
                for step in 1..=4 {
                    let logits = random.values(vocab, 2.5);
                    let want = sampler::sample(&logits, &history, &sampling).unwrap();
                    let logits = DevBuf::from_host(&stream, "logits", &logits).unwrap();
                    ops::sample(&stream, &mut state, &logits, &sampling, &[]).unwrap();
                    stream.synchronize().unwrap();
                    let got = state.tokens.arrived(0, step).next().unwrap().unwrap();
                    assert_eq!(
                        got.sampled.id, want.id,
                        "vocab {vocab} case {case} {sampling:?} trial {trial} step {step}"
                    );
                    assert_eq!((got.row, got.drafts), (0, 0));
                    assert_eq!(state.tokens.arrived(0, step).count(), 1);
                    assert_eq!(
                        state.tokens.arrived(0, step + 1).count(),
                        0,
                        "an older generation's are gone"
                    );
                    worst = worst.max((got.sampled.logprob - want.logprob).abs());
                    history.push(want.id);
                    let length = history.len() as u32;
                    assert_eq!(state.state(&stream, 0).unwrap(), [length - 1, step as u32, length, 0, 0, 1]);
                    let words = state.step.download(&stream, 0, STEP_FIRST + 4).unwrap();
                    assert_eq!((words[0], &words[STEP_FIRST..]), (1, &[want.id, length - 1, 0, 0][..]));
                }
            }
        }
        eprintln!("MEASURED sample vocab {vocab}: worst log probability difference {worst:.2e}");
        assert!(worst <= LOGPROB_TOLERANCE, "log probability differs by {worst:.2e}");
    }
}

/// -0 and 0 are equal: the lower id wins, and top_k keeps both.
#[test]
fn sample_holds_both_zeros_for_equal() {
    let Some((gpu, stream)) = gpu() else { return };
    let vocab = 4096;
    let mut state = SamplerState::new(&gpu, &stream, single(vocab, 1, 64)).unwrap();
    let mut logits = vec![-5f32; vocab];
    (logits[700], logits[3000]) = (-0.0, 0.0);
    let buffer = DevBuf::from_host(&stream, "logits", &logits).unwrap();
    for seed in 0..20 {
        for sampling in [Sampling::greedy(), Sampling::greedy().temperature(1.0).top_k(1).seed(seed)] {
            let want = sampler::sample(&logits, &[1, 2], &sampling).unwrap();
            ops::start(&stream, &mut state, 0, &[1, 2]).unwrap();
            ops::sample(&stream, &mut state, &buffer, &sampling, &[]).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(
                state.tokens.arrived(0, 1).next().unwrap().unwrap().sampled.id,
                want.id,
                "{sampling:?}"
            );
        }
    }
}

#[test]
fn sample_names_a_logit_that_is_no_number() {
    let Some((gpu, stream)) = gpu() else { return };
    let mut state = SamplerState::new(&gpu, &stream, single(4096, 1, 64)).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = Random::new(1).values(4096, 1.0);
        logits[3000] = bad;
        logits[77] = bad;
        ops::start(&stream, &mut state, 0, &[1, 2]).unwrap();
        let logits = DevBuf::from_host(&stream, "logits", &logits).unwrap();
        ops::sample(&stream, &mut state, &logits, &Sampling::default(), &[]).unwrap();
        stream.synchronize().unwrap();
        let message = state.tokens.arrived(0, 1).next().unwrap().unwrap_err().to_string();
        assert!(message.contains("token 77 "), "{message}");
    }
}

/// What a slot should hold: plain decoding and `src/speculate.rs`.
struct Slot {
    history: Vec<u32>,
    position: usize,
    made: usize,
    done: bool,
    pace: Pace,
    drafts: Vec<u32>,
}

/// What ends a generation.
struct Ends<'a> {
    max_context: usize,
    stop_ids: &'a [u32],
}

impl Slot {
    fn new(history: &[u32]) -> Slot {
        Slot {
            history: history.to_vec(),
            position: history.len() - 1,
            made: 0,
            done: false,
            pace: Pace::default(),
            drafts: Vec::new(),
        }
    }

    /// The ids of a step over `rows`, one by one.
    fn step(
        &mut self,
        rows: &[Vec<f32>],
        sampling: &Sampling,
        ends: &Ends<'_>,
        most_drafts: usize,
    ) -> Vec<u32> {
        let mut chosen = Vec::new();
        for logits in rows {
            if self.done {
                break;
            }
            let id = sampler::sample(logits, &self.history, sampling).unwrap().id;
            let right = self.drafts.get(chosen.len()) == Some(&id);
            chosen.push(id);
            self.history.push(id);
            (self.position, self.made) = (self.position + 1, self.made + 1);
            self.done = ends.stop_ids.contains(&id)
                || self.made >= sampling.max_new_tokens
                || self.position >= ends.max_context;
            if !right {
                break;
            }
        }
        if chosen.is_empty() {
            return chosen;
        }
        let may = self.pace.next(self.drafts.len(), chosen.len() - 1);
        let room = speculate::room(self.position, ends.max_context, self.made, sampling.max_new_tokens);
        let most = if may && !self.done { room.min(most_drafts) } else { 0 };
        self.drafts = speculate::draft(&self.history, most);
        chosen
    }

    fn state(&self) -> Vec<u32> {
        let Slot { position, made, history, done, pace, .. } = self;
        [*position, *made, history.len(), usize::from(*done), pace.wait, pace.backoff]
            .map(|v| v as u32)
            .to_vec()
    }

    /// The step that follows, of a single slot, up to `rows` tokens.
    fn next_step(&self, rows: usize) -> Vec<u32> {
        let last = *self.history.last().unwrap();
        let token = |row: usize| match self.drafts.get(row.wrapping_sub(1)) {
            Some(&id) => [id, (self.position + row) as u32, 0, 0],
            None => [last, self.position as u32, 0, row as u32],
        };
        (0..rows).flat_map(token).collect()
    }
}

/// Logits of a step; a row's choice follows the draft behind it while `right` lasts.
fn steered(random: &mut Random, vocab: usize, rows: usize, drafts: &[u32], right: usize) -> Vec<Vec<f32>> {
    let row = |row: usize| {
        let mut logits = random.values(vocab, 2.5);
        if let Some(&id) = drafts.get(row).filter(|_| row < right) {
            logits[id as usize] = 30.0;
        }
        logits
    };
    (0..rows).map(row).collect()
}

/// A generation of `steps` steps on the GPU, each compared with the reference. Gives the bits of all that came out.
fn speculate_once(
    (gpu, stream): (&Gpu, &Stream),
    shape: SamplerShape,
    sampling: &Sampling,
    seed: u64,
    ends: &Ends<'_>,
    length: usize,
) -> Vec<u32> {
    let SamplerShape { rows, vocab, .. } = shape;
    let mut random = Random::new(seed);
    let history = repetitive(&mut random, length, vocab);
    let mut state = SamplerState::new(gpu, stream, shape).unwrap();
    ops::start(stream, &mut state, 0, &history).unwrap();
    let mut slot = Slot::new(&history);
    let mut bits = Vec::new();
    for step in 0..12 {
        let drafts = slot.drafts.clone();
        // All wrong, all right, wrong in the middle.
        let right = [rows, 0, rows, rows, drafts.len() / 2, rows][step % 6];
        let logits = steered(&mut random, vocab, rows, &drafts, right);
        let (first, was_done) = (slot.made + 1, slot.done);
        let want = slot.step(&logits[..=drafts.len()], sampling, ends, rows - 1);
        let buffer = DevBuf::from_host(stream, "logits", &logits.concat()).unwrap();
        ops::sample(stream, &mut state, &buffer, sampling, ends.stop_ids).unwrap();
        stream.synchronize().unwrap();
        let what = format!("vocab {vocab} rows {rows} seed {seed} step {step} {sampling:?}");
        let got: Vec<_> = state.tokens.arrived(0, first).map(|token| token.unwrap()).collect();
        assert_eq!(got.iter().map(|t| t.sampled.id).collect::<Vec<_>>(), want, "{what}");
        for (row, token) in got.iter().enumerate() {
            assert_eq!((token.row, token.drafts), (row, drafts.len()), "{what}");
            bits.push(token.sampled.logprob.to_bits());
        }
        assert_eq!(state.state(stream, 0).unwrap(), slot.state(), "{what}");
        let words = state.step.download(stream, 0, STEP_FIRST + 4 * STEP_TOKENS).unwrap();
        if slot.done {
            assert_eq!(words[0], 0, "{what}");
        } else {
            assert_eq!(words[0] as usize, 1 + slot.drafts.len(), "{what}");
            assert_eq!(words[STEP_FIRST..][..4 * rows], slot.next_step(rows), "{what}");
        }
        assert!(!was_done || got.is_empty(), "{what}: nothing comes after the end");
        bits.extend(words);
    }
    bits
}

#[test]
fn sample_of_several_rows_is_that_of_one_by_one() {
    let Some((gpu, stream)) = gpu() else { return };
    let room = |max_context| Ends { max_context, stop_ids: &[] };
    let mut seed = 0;
    for (vocab, rows, lengths) in
        [(4096, 8, &[3, 60, 1000][..]), (4096, 2, &[60]), (65024, 8, &[60]), (65024, 3, &[1000])]
    {
        for (setting, &length) in settings().iter().flat_map(|s| lengths.iter().map(move |l| (s, l))) {
            seed += 1;
            let sampling = Sampling { seed, ..setting.clone() }.speculate(true);
            let shape = single(vocab, rows, 1200);
            let once = || speculate_once((&gpu, &stream), shape, &sampling, seed, &room(1200), length);
            let bits = once();
            assert!(rows != 8 || vocab == 65024 && seed % 4 > 0 || bits == once(), "second run differs");
        }
    }
}

#[test]
fn sample_ends_at_the_last_position_the_last_token_and_stop_ids() {
    let Some((gpu, stream)) = gpu() else { return };
    let sampling = Sampling::greedy().speculate(true);
    for seed in 0..6 {
        for length in [50, 57, 60, 63, 64] {
            let ends = Ends { max_context: 64, stop_ids: &[] };
            speculate_once((&gpu, &stream), single(4096, 8, 64), &sampling, seed, &ends, length);
        }
        for max_new_tokens in [1, 2, 3, 7, 12] {
            let sampling = sampling.clone().max_new_tokens(max_new_tokens);
            let ends = Ends { max_context: 1000, stop_ids: &[] };
            speculate_once((&gpu, &stream), single(4096, 8, 1000), &sampling, seed, &ends, 100);
        }
        // Ids of the history, which drafts are made of.
        let ends = Ends { max_context: 1000, stop_ids: &[4000, 256, 512] };
        speculate_once((&gpu, &stream), single(4096, 8, 1000), &sampling, seed, &ends, 100);
    }
}

/// A slot for each row: each ends for itself, and keeps its token of the step.
#[test]
fn sample_of_several_slots_serves_each() {
    let Some((gpu, stream)) = gpu() else { return };
    for (vocab, slots) in [(4096, 5), (65024, 16), (4096, 64)] {
        for (case, setting) in settings().into_iter().enumerate().filter(|(case, _)| slots < 64 || *case == 8)
        {
            let once = || {
                let mut random = Random::new(case as u64);
                let sampling = Sampling { seed: 9 + case as u64, ..setting.clone() };
                let shape = SamplerShape { slots, rows: slots, vocab, max_context: 80 };
                let mut state = SamplerState::new(&gpu, &stream, shape).unwrap();
                let stop_ids = [7, 5];
                let ends = Ends { max_context: 80, stop_ids: &stop_ids };
                let mut all: Vec<Slot> = (0..slots)
                    .map(|slot| Slot::new(&repetitive(&mut random, [40, 3, 77, 80, 20][slot % 5], vocab)))
                    .collect();
                for (slot, sequence) in all.iter().enumerate() {
                    ops::start(&stream, &mut state, slot, &sequence.history).unwrap();
                }
                let mut bits = Vec::new();
                for step in 0..5 {
                    let mut logits = steered(&mut random, vocab, slots, &[], 0);
                    if step == 2 {
                        logits[1][5] = 50.0; // a stop id
                    }
                    let buffer = DevBuf::from_host(&stream, "logits", &logits.concat()).unwrap();
                    let before = state.step.download(&stream, 0, STEP_FIRST + 4 * slots).unwrap();
                    ops::sample(&stream, &mut state, &buffer, &sampling, &stop_ids).unwrap();
                    let after = state.step.download(&stream, 0, STEP_FIRST + 4 * slots).unwrap();
                    assert_eq!(after[0] as usize, slots);
                    for (slot, sequence) in all.iter_mut().enumerate() {
                        let first = sequence.made + 1;
                        let want = sequence.step(&logits[slot..=slot], &sampling, &ends, 0);
                        let got: Vec<_> =
                            state.tokens.arrived(slot, first).map(|token| token.unwrap().sampled).collect();
                        let what = format!("slot {slot} of {slots} step {step} {sampling:?}");
                        assert_eq!(got.iter().map(|t| t.id).collect::<Vec<_>>(), want, "{what}");
                        assert_eq!(state.state(&stream, slot).unwrap(), sequence.state(), "{what}");
                        let at = STEP_FIRST + 4 * slot;
                        let token = if sequence.done {
                            before[at..at + 4].to_vec()
                        } else {
                            let slot = slot as u32;
                            vec![*want.last().unwrap(), sequence.position as u32, slot, slot]
                        };
                        assert_eq!(after[at..at + 4], token, "{what}");
                        bits.extend(got.iter().map(|token| token.logprob.to_bits()));
                    }
                }
                assert!(all[1].done && all[3].done && !all[0].done);
                bits
            };
            assert!(once() == once(), "second run differs");
        }
    }
}
