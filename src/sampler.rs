//! Choosing the next token: Hugging Face `generate` semantics, in its order and with its formulas.
//!
//! ```text
//! logits [vocab] f32 -> repetition penalty -> no-repeat n-gram -> greedy: the largest
//!                                                              -> else: / temperature -> top-k -> top-p -> min-p -> Gumbel-max
//! ```
//!
//! This is the reference: dull loops and a full sort, probabilities in f64. The random choice is Gumbel-max: each
//! kept id gets its score plus a random number that depends on seed, id and position only, and the largest wins.
//! That draws from exactly the kept probabilities, needs no order and no running sum, and so the GPU makes the
//! same choice however it is parallelised. Equal scores go to the lowest id.
//!
//! Cost: one copy and one sort of the logits, a few milliseconds for 65024.

use std::cmp::Ordering;

use crate::error::{Error, Result};

/// How tokens are chosen and when a text ends. Defaults are Hugging Face's (`do_sample=False`: greedy), except
/// `max_new_tokens`, which Hugging Face leaves to its caller.
///
/// ```
/// use peregrine::sampler::Sampling;
/// let careful = Sampling::greedy().max_new_tokens(64).repetition_penalty(1.15);
/// let lively = Sampling::default().temperature(0.7).top_p(0.95).seed(7).stop("\nUser");
/// assert!(careful.validate().is_ok() && lively.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy (no sampling); otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely ids when sampling; 0 disables. Hugging Face's default is 50.
    pub top_k: usize,
    /// Keep the smallest set of ids whose probabilities sum to at least this; 1 disables.
    pub top_p: f32,
    /// Drop ids less likely than this times the most likely; 0 disables.
    pub min_p: f32,
    /// Every id seen in prompt or output has its logit divided (if positive) or multiplied (if negative) by this;
    /// 1 disables.
    pub repetition_penalty: f32,
    /// No run of this many ids occurs twice; 0 disables.
    pub no_repeat_ngram_size: usize,
    /// Seed of the random choice. The same seed gives the same text.
    pub seed: u64,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after an end-of-text id (for measuring).
    pub ignore_eos: bool,
    /// Draft what is likely to follow from the text so far, and verify several tokens in one forward pass: the same tokens,
    /// faster where a text repeats itself (see [`crate::speculate`]). On a GPU this takes the persistent kernel; where that does
    /// not fit, each step gives one token as without.
    pub speculate: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            seed: 0,
            max_new_tokens: 512,
            stop: Vec::new(),
            ignore_eos: false,
            speculate: false,
        }
    }
}

impl Sampling {
    /// The most likely token, always.
    #[must_use]
    pub fn greedy() -> Self {
        Sampling::default()
    }

    /// Sets [`Sampling::temperature`].
    #[must_use]
    pub fn temperature(self, temperature: f32) -> Self {
        Sampling { temperature, ..self }
    }

    /// Sets [`Sampling::top_k`].
    #[must_use]
    pub fn top_k(self, top_k: usize) -> Self {
        Sampling { top_k, ..self }
    }

    /// Sets [`Sampling::top_p`].
    #[must_use]
    pub fn top_p(self, top_p: f32) -> Self {
        Sampling { top_p, ..self }
    }

    /// Sets [`Sampling::min_p`].
    #[must_use]
    pub fn min_p(self, min_p: f32) -> Self {
        Sampling { min_p, ..self }
    }

    /// Sets [`Sampling::repetition_penalty`].
    #[must_use]
    pub fn repetition_penalty(self, repetition_penalty: f32) -> Self {
        Sampling { repetition_penalty, ..self }
    }

    /// Sets [`Sampling::no_repeat_ngram_size`].
    #[must_use]
    pub fn no_repeat_ngram_size(self, no_repeat_ngram_size: usize) -> Self {
        Sampling { no_repeat_ngram_size, ..self }
    }

    /// Sets [`Sampling::seed`].
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Sampling { seed, ..self }
    }

    /// Sets [`Sampling::max_new_tokens`].
    #[must_use]
    pub fn max_new_tokens(self, max_new_tokens: usize) -> Self {
        Sampling { max_new_tokens, ..self }
    }

    /// Adds one text to [`Sampling::stop`].
    #[must_use]
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Sets [`Sampling::ignore_eos`].
    #[must_use]
    pub fn ignore_eos(self, ignore_eos: bool) -> Self {
        Sampling { ignore_eos, ..self }
    }

    /// Sets [`Sampling::speculate`].
    #[must_use]
    pub fn speculate(self, speculate: bool) -> Self {
        Sampling { speculate, ..self }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag, what was given and what is wanted. NaN is never right.
    pub fn validate(&self) -> Result<()> {
        let wanted = |right: bool, flag: &str, got: &dyn std::fmt::Display, wanted: &str| {
            if right { Ok(()) } else { Err(Error::Usage(format!("--{flag} {got}: wanted {wanted}"))) }
        };
        // Below the smallest temperature the quotient of a large logit would overflow.
        let temperature = self.temperature == 0.0 || (MIN_TEMPERATURE..=f32::MAX).contains(&self.temperature);
        let expected = format!("0 (greedy) or a number from {MIN_TEMPERATURE} up");
        wanted(temperature, "temperature", &self.temperature, &expected)?;
        let top_p = self.top_p > 0.0 && self.top_p <= 1.0;
        wanted(top_p, "top-p", &self.top_p, "more than 0 and at most 1 (1 keeps all)")?;
        let min_p = (0.0..=1.0).contains(&self.min_p);
        wanted(min_p, "min-p", &self.min_p, "a number from 0 (keeps all) to 1")?;
        let penalty = self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite();
        wanted(
            penalty,
            "repetition-penalty",
            &self.repetition_penalty,
            "a number above 0 (1 changes nothing)",
        )?;
        wanted(self.max_new_tokens > 0, "max-new-tokens", &self.max_new_tokens, "at least 1")?;
        let stop = self.stop.iter().all(|text| !text.is_empty());
        wanted(stop, "stop", &"\"\"", "a text that is not empty")
    }
}

/// The smallest temperature above greedy.
pub const MIN_TEMPERATURE: f32 = 1e-4;

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability under the model's own logits (before any processing).
    pub logprob: f32,
}

/// Chooses a token from `logits` `[vocab]` after `history`, all tokens so far (prompt and output). The random number
/// of an id depends on the seed, the id and the position, `history.len()`.
///
/// # Errors
/// [`Error::Cuda`] of operation `sample` if a logit is NaN or +infinity (the model's output is broken), or if none
/// is left to choose. A logit of -infinity is an id that is never chosen.
pub fn sample(logits: &[f32], history: &[u32], s: &Sampling) -> Result<Sampled> {
    let broken = |what: String| Error::Cuda { op: "sample".into(), what };
    if let Some(id) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        let position = history.len();
        return Err(broken(format!(
            "the logit of id {id} at position {position} is {}, wanted a finite number",
            logits[id]
        )));
    }
    let mut processed = logits.to_vec();
    process(&mut processed, history, s);
    let position = history.len() as u32;
    let scored = kept(&processed, s).into_iter().map(|(id, _)| {
        let logit = processed[id as usize];
        (id, if s.temperature > 0.0 { logit / s.temperature + gumbel(s.seed, id, position) } else { logit })
    });
    let best = scored.reduce(|best, next| {
        let better = next.1 > best.1 || (next.1 == best.1 && next.0 < best.0);
        if better { next } else { best }
    });
    let Some((id, _)) = best else {
        return Err(broken(format!(
            "none of the {} ids may be chosen; relax no_repeat_ngram_size",
            logits.len()
        )));
    };
    Ok(Sampled { id, logprob: log_softmax(logits, id) })
}

/// Repetition penalty, then no-repeat n-gram, on `logits` `[vocab]`: what greedy and sampling have in common. Ids of
/// `history` beyond the vocabulary are ignored.
pub fn process(logits: &mut [f32], history: &[u32], s: &Sampling) {
    if s.repetition_penalty != 1.0 {
        let mut seen = vec![false; logits.len()];
        for &id in history {
            // Once per id, however often it occurred.
            if let Some(seen) = seen.get_mut(id as usize).filter(|seen| !**seen) {
                *seen = true;
                let logit = &mut logits[id as usize];
                *logit =
                    if *logit < 0.0 { *logit * s.repetition_penalty } else { *logit / s.repetition_penalty };
            }
        }
    }
    if s.no_repeat_ngram_size > 0 {
        for id in ngram_endings(history, s.no_repeat_ngram_size) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// The ids that have followed, somewhere in `history`, the `size - 1` tokens it ends with.
fn ngram_endings(history: &[u32], size: usize) -> impl Iterator<Item = u32> {
    let tail = history.get((history.len() + 1).saturating_sub(size)..).unwrap_or(&[]);
    history
        .windows(size)
        .filter(move |window| window[..size - 1] == *tail)
        .map(move |window| window[size - 1])
}

/// The ids a token is drawn from and their probabilities, by falling probability (equal ones by rising id): what
/// temperature, top-k, top-p and min-p leave of processed `logits` `[vocab]`. A greedy `s` leaves the best id alone.
/// Empty if every logit is -infinity. Probabilities sum to 1.
#[must_use]
pub fn kept(logits: &[f32], s: &Sampling) -> Vec<(u32, f32)> {
    let temperature = if s.temperature > 0.0 { s.temperature } else { 1.0 };
    let scores = (0u32..).zip(logits.iter().map(|logit| logit / temperature));
    let mut candidates: Vec<(u32, f32)> = scores.filter(|(_, score)| *score > f32::NEG_INFINITY).collect();
    // The filter left nothing incomparable; unlike `total_cmp` this holds -0 and 0 for equal.
    candidates.sort_unstable_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    if s.temperature == 0.0 {
        candidates.truncate(1);
    }
    // Equal to the k-th largest is kept too.
    if let Some(&(_, kth)) = s.top_k.checked_sub(1).and_then(|k| candidates.get(k)) {
        candidates.retain(|(_, score)| *score >= kth);
    }
    if s.top_p < 1.0 {
        // From the least likely: drop while what has been dropped stays within 1 - top_p.
        let mut dropped = 0.0;
        let probabilities = softmax(&candidates);
        let surplus = |p: &&f64| {
            dropped += **p;
            dropped <= 1.0 - f64::from(s.top_p)
        };
        let surplus = probabilities.iter().rev().take_while(surplus).count();
        candidates.truncate((candidates.len() - surplus).max(1));
    }
    if s.min_p > 0.0 {
        let probabilities = softmax(&candidates);
        let most = probabilities.first().copied().unwrap_or(0.0);
        let likely = probabilities.iter().take_while(|p| **p >= f64::from(s.min_p) * most).count();
        candidates.truncate(likely.max(1));
    }
    let probabilities = softmax(&candidates);
    candidates.iter().zip(probabilities).map(|((id, _), p)| (*id, p as f32)).collect()
}

/// Probabilities of scores sorted by falling score.
fn softmax(sorted: &[(u32, f32)]) -> Vec<f64> {
    let most = sorted.first().map_or(0.0, |(_, score)| f64::from(*score));
    let weights: Vec<f64> = sorted.iter().map(|(_, score)| (f64::from(*score) - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// Logarithm of the softmax of `logits` at `id`.
fn log_softmax(logits: &[f32], id: u32) -> f32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - f64::from(most)).exp()).sum();
    (f64::from(logits[id as usize]) - f64::from(most) - sum.ln()) as f32
}

/// The standard Gumbel random number of `id` at `position`: `-ln(-ln(u))` for a uniform u, written as
/// `-ln(-ln_1p(-v))`, v = 1 - u, because the large values, which decide, need a v close to 0 and f32 is finest
/// there. At most 22.9, at least -2.8.
#[must_use]
pub fn gumbel(seed: u64, id: u32, position: u32) -> f32 {
    let random = philox4x32_10([id, position, 0, 0], [seed as u32, (seed >> 32) as u32])[0];
    // In (0, 1): half a step above 0, and the largest f32 below 1, where rounding would give 1.
    let v = ((random as f32 + 0.5) * 2f32.powi(-32)).min(1.0 - 2f32.powi(-24));
    -(-(-v).ln_1p()).ln()
}

/// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
/// (2011): a bijection of `counter` under `key`, so that any random number can be had without the ones before.
#[must_use]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}
