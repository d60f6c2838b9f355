//! Tests of a loaded model, in the sense of llama-bench: `pp512` processes a prompt, `tg128` generates, each at a depth (tokens
//! that are in the cache already) and for several texts together.
//!
//! What is in the numbers. Prompt: from the call to the host's having the first token of every text: all passes over the layers,
//! the head, the choice of a token, its way to the host. Answer: from the first token's arrival to the last one's, the choice of
//! tokens and their way to the host included; it ends at the length asked for, whatever the tokens are. Tokenising is in neither:
//! prompts are random ids. Texts are processed one after the other in a prompt, and together in a step.

use std::time::Instant;

use crate::engine::{Batch, Engine, SessionOptions};
use crate::error::{Error, Result};
use crate::sampler::Sampling;

/// One test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Test {
    /// Tokens of the prompt; 0 in a test of generating.
    pub prompt: usize,
    /// Tokens generated; 0 in a test of prompts.
    pub generate: usize,
    /// Tokens in the cache before.
    pub depth: usize,
    /// Texts together.
    pub texts: usize,
}

impl Test {
    /// llama-bench's name: `pp512`, `tg128 @ d1024`.
    #[must_use]
    pub fn name(&self) -> String {
        let what =
            if self.generate > 0 { format!("tg{}", self.generate) } else { format!("pp{}", self.prompt) };
        if self.depth > 0 { format!("{what} @ d{}", self.depth) } else { what }
    }

    /// `1 text`, `8 texts`.
    #[must_use]
    pub fn together(&self) -> String {
        format!("{} text{}", self.texts, if self.texts == 1 { "" } else { "s" })
    }

    /// Positions a text takes.
    #[must_use]
    pub fn positions(&self) -> usize {
        // What an answer begins with is a token too, and its last token is never appended.
        self.depth + self.prompt.max(1) + self.generate
    }

    /// The tests of these lists: all prompts, then all answers, for each number of texts and depth.
    #[must_use]
    pub fn all(prompts: &[usize], answers: &[usize], depths: &[usize], texts: &[usize]) -> Vec<Test> {
        let mut tests = Vec::new();
        for &texts in texts {
            for &depth in depths {
                let of = |prompt, generate| Test { prompt, generate, depth, texts };
                tests.extend(prompts.iter().filter(|&&p| p > 0).map(|&p| of(p, 0)));
                tests.extend(answers.iter().filter(|&&n| n > 0).map(|&n| of(0, n)));
            }
        }
        tests
    }
}

/// One repetition of a test, in seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// What is rated: the prompt's time or the answer's.
    pub seconds: f64,
    /// From one token's arrival to the next, of an answer.
    pub gaps: Vec<f64>,
}

/// Runs tests on one model; keeps the batch of the last number of texts.
pub struct Runner {
    engine: Engine,
    sampling: Sampling,
    batch: Option<Batch>,
    /// Tokens of depth the batch's caches hold.
    depth: usize,
}

impl Runner {
    /// For a model, with tokens chosen as `sampling` says.
    #[must_use]
    pub fn new(engine: Engine, sampling: Sampling) -> Runner {
        Runner { engine, sampling, batch: None, depth: 0 }
    }

    /// The model.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Random ids of text `text`, the same each time.
    fn ids(&self, text: usize, first: usize, count: usize) -> Vec<u32> {
        let vocab = self.engine.config().vocab_size as u64;
        let id = |i: usize| ((text * 1_000_003 + i + 1) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        (first..first + count).map(|i| (id(i) % vocab) as u32).collect()
    }

    /// Makes the batch, and fills its caches to the test's depth.
    ///
    /// # Errors
    /// [`Error::Usage`] if the test needs more positions than the model has; as [`Engine::batch`].
    pub fn prepare(&mut self, test: &Test) -> Result<()> {
        let most = self.engine.config().max_positions;
        if test.positions() > most {
            return Err(Error::Usage(format!(
                "{}: {} positions, the model has {most}",
                test.name(),
                test.positions()
            )));
        }
        if self.batch.as_ref().is_none_or(|batch| batch.slots() != test.texts) {
            self.batch = None; // its memory first
            self.batch = Some(self.engine.batch(test.texts, SessionOptions::default())?);
            self.depth = 0;
        }
        if self.depth < test.depth {
            self.depth = 0;
            self.begin(test.depth, 0, 1)?;
            self.step()?;
            self.depth = test.depth;
        }
        Ok(())
    }

    /// Keeps `depth` tokens of each text and appends `prompt` more.
    fn begin(&mut self, prompt: usize, depth: usize, generate: usize) -> Result<()> {
        let texts = self.batch.as_ref().map_or(0, Batch::slots);
        let prompts: Vec<Vec<u32>> = (0..texts).map(|text| self.ids(text, 0, depth + prompt)).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let sampling = self.sampling.clone().max_new_tokens(generate).ignore_eos(true);
        match &mut self.batch {
            Some(batch) => batch.begin_after(depth, &prompts, &sampling),
            None => Err(Error::Usage("run: nothing was prepared".into())),
        }
    }

    fn step(&mut self) -> Result<()> {
        let tokens = self.batch.as_mut().map_or(Ok(Vec::new()), Batch::next_step)?;
        if tokens.iter().all(Option::is_some) {
            return Ok(());
        }
        Err(Error::Io("an answer ended before its time".into()))
    }

    /// One repetition.
    ///
    /// # Errors
    /// As [`Runner::prepare`]; [`Error::Cuda`] if the GPU fails.
    pub fn once(&mut self, test: &Test) -> Result<Sample> {
        self.prepare(test)?;
        // Whatever follows writes behind it.
        self.depth = test.depth;
        #[cfg(feature = "cuda")]
        let _range = crate::gpu::nvtx::range(&test.name());
        let start = Instant::now();
        if test.generate == 0 {
            self.begin(test.prompt, test.depth, 1)?;
            self.step()?;
            return Ok(Sample { seconds: start.elapsed().as_secs_f64(), gaps: Vec::new() });
        }
        self.begin(1, test.depth, test.generate + 1)?;
        self.step()?;
        let first = Instant::now();
        let mut last = first;
        let mut gaps = Vec::with_capacity(test.generate);
        for _ in 0..test.generate {
            self.step()?;
            let now = Instant::now();
            gaps.push((now - last).as_secs_f64());
            last = now;
        }
        Ok(Sample { seconds: (last - first).as_secs_f64(), gaps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_named_as_llama_bench_names_them() {
        let all = Test::all(&[128, 512], &[32], &[0, 1024], &[1, 8]);
        assert_eq!(all.len(), 12);
        let names: Vec<String> = all.iter().take(6).map(Test::name).collect();
        assert_eq!(names, ["pp128", "pp512", "tg32", "pp128 @ d1024", "pp512 @ d1024", "tg32 @ d1024"]);
        assert_eq!(Test::all(&[0], &[4], &[0], &[1]).len(), 1);
        assert_eq!(all[5].positions(), 1024 + 1 + 32);
        assert_eq!(all[4].positions(), 1024 + 512);
    }
}
