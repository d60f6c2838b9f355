//! An answer being written: an iterator of tokens that knows when to stop.
//!
//! Every ending is known when the last token is chosen, so text that was held back (half a character, what might
//! have become a stop string) comes with that token, and nothing comes after it.

use std::time::Instant;

use super::session::Session;
use crate::error::Result;
use crate::sampler::Sampling;
use crate::speculate::Tally;
use crate::tokenizer::TextStream;

/// One token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// What became printable with it: empty while a character or a possible stop string is incomplete, then several
    /// tokens' text at once. Always empty without a tokenizer.
    pub text: String,
    /// Natural logarithm of its probability under the model's own logits.
    pub logprob: f32,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended the text.
    EndOfText,
    /// One of [`Sampling::stop`] was completed.
    StopString,
    /// [`Sampling::max_new_tokens`] tokens were generated.
    MaxNewTokens,
    /// The context holds no more tokens.
    ContextFull,
}

/// What a generation did, and how long it took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerationStats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the one that ended the answer included.
    pub new_tokens: usize,
    /// Processing of the prompt up to the choice of the first token.
    pub prefill_seconds: f64,
    /// From the first token to the last one so far. What the caller does between tokens is in it: the GPU works on
    /// meanwhile, so leaving it out would flatter the rate.
    pub decode_seconds: f64,
    /// From the call to the first token: `prefill_seconds` and the tokenizer's time.
    pub first_token_seconds: f64,
    /// Forward passes after the prompt's. Without [`Sampling::speculate`] each gives one token; with it, one and another
    /// for every draft that was right.
    pub decode_steps: usize,
    /// Drafts in those passes.
    pub drafts: usize,
    /// Drafts that were right.
    pub accepted_drafts: usize,
}

impl GenerationStats {
    /// Prompt tokens per second; `None` before the first token.
    #[must_use]
    pub fn prefill_rate(&self) -> Option<f64> {
        (self.prefill_seconds > 0.0).then(|| self.prompt_tokens as f64 / self.prefill_seconds)
    }

    /// Tokens per second after the first; `None` before the second.
    #[must_use]
    pub fn decode_rate(&self) -> Option<f64> {
        (self.decode_seconds > 0.0).then(|| (self.new_tokens - 1) as f64 / self.decode_seconds)
    }
}

/// An answer being written. Dropping it stops; the session keeps the tokens yielded so far.
pub struct Generation<'s> {
    session: &'s mut Session,
    max_new_tokens: usize,
    ignore_eos: bool,
    stream: TextStream,
    /// All text yielded, where stop strings are looked for.
    printed: String,
    watches_stop: bool,
    /// Length of the session's tokens when the answer began.
    answer_start: usize,
    stop_reason: Option<StopReason>,
    failed: bool,
    started: Instant,
    prefill_started: Instant,
    stats: GenerationStats,
}

impl<'s> Generation<'s> {
    pub(super) fn new(
        session: &'s mut Session,
        prompt_tokens: usize,
        sampling: &Sampling,
        started: Instant,
        prefill_started: Instant,
    ) -> Generation<'s> {
        Generation {
            max_new_tokens: sampling.max_new_tokens,
            ignore_eos: sampling.ignore_eos,
            stream: TextStream::new(&sampling.stop),
            printed: String::new(),
            watches_stop: !sampling.stop.is_empty(),
            answer_start: session.tokens.len(),
            stop_reason: None,
            failed: false,
            started,
            prefill_started,
            stats: GenerationStats { prompt_tokens, ..GenerationStats::default() },
            session,
        }
    }

    /// Why the answer ended; `None` while it has not.
    #[must_use]
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.stop_reason
    }

    /// Figures up to the last token yielded.
    #[must_use]
    pub fn stats(&self) -> GenerationStats {
        self.stats
    }

    fn choose(&mut self) -> Result<Token> {
        let sampled = self.session.timeline.next_token()?;
        self.session.tokens.push(sampled.id);
        self.stats.new_tokens += 1;
        let Tally { steps, drafts, accepted } = self.session.timeline.tally();
        self.stats.decode_steps = steps.saturating_sub(1);
        (self.stats.drafts, self.stats.accepted_drafts) = (drafts, accepted);
        if self.stats.new_tokens == 1 {
            self.stats.prefill_seconds = self.prefill_started.elapsed().as_secs_f64();
            self.stats.first_token_seconds = self.started.elapsed().as_secs_f64();
        } else {
            self.stats.decode_seconds = self.started.elapsed().as_secs_f64() - self.stats.first_token_seconds;
        }
        let text = self.text_of(sampled.id);
        Ok(Token { id: sampled.id, text, logprob: sampled.logprob })
    }

    /// The text `id` makes printable; decides whether it is the last.
    fn text_of(&mut self, id: u32) -> String {
        let mut text = String::new();
        let ends_text = self.session.engine.stop_ids().contains(&id);
        if ends_text && !self.ignore_eos {
            self.stop_reason = Some(StopReason::EndOfText);
        } else if let Some(bytes) = self.session.engine.tokenizer().ok().and_then(|t| t.token_bytes(id)) {
            // A special token that is ignored has no text, as in Hugging Face's skip_special_tokens.
            let step = self.stream.push(if ends_text { &[] } else { bytes });
            text = step.text;
            self.stop_reason = step.stopped.then_some(StopReason::StopString);
        }
        if self.stop_reason.is_none() && self.stats.new_tokens >= self.max_new_tokens {
            self.stop_reason = Some(StopReason::MaxNewTokens);
        }
        if self.stop_reason.is_none() && self.session.tokens.len() > self.session.max_context {
            self.stop_reason = Some(StopReason::ContextFull);
        }
        if self.stop_reason.is_some() {
            text.push_str(&self.stream.finish());
        }
        if self.watches_stop {
            self.printed.push_str(&text);
        }
        self.drop_ending();
        text
    }

    /// Takes what ended the answer off the session's tokens.
    fn drop_ending(&mut self) {
        let tokens = &mut self.session.tokens;
        match self.stop_reason {
            Some(StopReason::EndOfText) => tokens.truncate(tokens.len() - 1),
            Some(StopReason::StopString) => {
                // A token whose text is not needed for what was printed holds nothing but the stop string, and
                // blank lines before it: "\n\n" is one token, and "\nUser" begins in its middle.
                let Ok(tokenizer) = self.session.engine.tokenizer() else { return };
                let (answer, printed) = (&tokens[self.answer_start..], self.printed.trim_end());
                let enough = |n: &usize| tokenizer.decode(&answer[..*n], true).starts_with(printed);
                let kept = (0..answer.len()).rev().take_while(enough).last().unwrap_or(answer.len());
                tokens.truncate(self.answer_start + kept);
            }
            _ => {}
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Token>;

    /// The next token; after an error nothing more.
    fn next(&mut self) -> Option<Result<Token>> {
        if self.failed || self.stop_reason.is_some() {
            return None;
        }
        let token = self.choose();
        self.failed = token.is_err();
        Some(token)
    }
}
