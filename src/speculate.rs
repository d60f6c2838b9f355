//! Speculation by prompt lookup: several tokens a step, the same tokens as one by one.
//!
//! ```text
//! history: ... the quick fox .... the quick    -> draft: fox ....
//! step:    quick fox ....                      one forward pass; row j says what follows draft j
//! keep:    row 0's token, and the next row's as long as the draft in front of it was that token
//! ```
//!
//! Answers repeat names, phrases, and the prompt. What followed the last few tokens when they stood together before is
//! drafted, and one forward pass over the last token and its drafts, which costs hardly more than one over the token
//! alone, says for each whether it was right. A row chooses as if the drafts in front of it were part of the text, so
//! that its token is the one plain decoding chooses, greedy or seeded, with every penalty.
//!
//! These are the plain functions; `cuda/sample.cu` does the same on the GPU, and is tested against them.

/// Most drafts of a step: with the token they follow, the 8 tokens that one pass over the weights serves.
pub const MOST_DRAFTS: usize = 7;

/// Most steps without drafts after drafts that were all wrong.
const MOST_BACKOFF: usize = 64;

/// Up to `most` drafts of what follows `history`: what followed the latest earlier occurrence of its last three tokens, or
/// of its last two if there is none. Where that reaches the end of the history it goes on with the drafts themselves: a
/// text that repeats itself every second token is drafted in full.
///
/// ```
/// use peregrine::speculate::draft;
/// assert_eq!(draft(&[1, 2, 3, 4, 5, 9, 1, 2, 3], 3), [4, 5, 9]);
/// assert_eq!(draft(&[7, 8, 7, 8], 5), [7, 8, 7, 8, 7]);
/// assert!(draft(&[1, 2, 3, 4], 7).is_empty());
/// ```
#[must_use]
pub fn draft(history: &[u32], most: usize) -> Vec<u32> {
    let follows = |n: usize| {
        let tail = &history[history.len().checked_sub(n)?..];
        let earlier = history[..history.len() - 1].windows(n).rposition(|window| window == tail)?;
        Some(earlier + n)
    };
    match follows(3).or_else(|| follows(2)) {
        Some(from) => history[from..].iter().copied().cycle().take(most).collect(),
        None => Vec::new(),
    }
}

/// Drafts there is room for in the step of a token at `position` that is token `made` of a generation: none beyond the
/// context, and none whose token would be one too many.
#[must_use]
pub fn room(position: usize, max_context: usize, made: usize, max_new_tokens: usize) -> usize {
    let left = max_context.saturating_sub(position).min(max_new_tokens.saturating_sub(made));
    left.saturating_sub(1)
}

/// When to draft. A step of seven drafts costs a third more than one without (1.469 ms, 1.113; `cuda/decode_step.cu`), so a
/// text that does not repeat must be left alone: after drafts that were all wrong come 1, 2, 4 .. 64 steps without, until one is right again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Steps without drafts still to go.
    pub wait: usize,
    /// How many follow the next failure.
    pub backoff: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { wait: 0, backoff: 1 }
    }
}

impl Pace {
    /// Counts a step of `drafts` drafts of which `right` were right; whether the next step may have drafts.
    pub fn next(&mut self, drafts: usize, right: usize) -> bool {
        if right > 0 {
            *self = Pace::default();
        } else if drafts > 0 {
            *self = Pace { wait: self.backoff, backoff: (2 * self.backoff).min(MOST_BACKOFF) };
        }
        let may = self.wait == 0;
        self.wait = self.wait.saturating_sub(1);
        may
    }
}

/// What a generation's steps came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Forward passes that gave tokens, the prompt's included.
    pub steps: usize,
    /// Drafts of those steps.
    pub drafts: usize,
    /// Drafts that were right, each a token without a step of its own.
    pub accepted: usize,
}

impl Tally {
    /// Counts a token: number `row` of its step, which had `drafts` drafts.
    pub fn count(&mut self, row: usize, drafts: usize) {
        if row == 0 {
            self.steps += 1;
            self.drafts += drafts;
        } else {
            self.accepted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_follow_the_latest_longest_match() {
        // Three tokens before two, the latest before earlier ones.
        assert_eq!(draft(&[1, 2, 3, 10, 2, 3, 11, 5, 1, 2, 3], 1), [10]);
        assert_eq!(draft(&[1, 2, 3, 10, 1, 2, 3, 11, 5, 1, 2, 3], 1), [11]);
        assert_eq!(draft(&[9, 2, 3, 10, 2, 3, 11, 5, 1, 2, 3], 2), [11, 5]);
        assert_eq!(draft(&[6, 6, 6], 4), [6, 6, 6, 6], "an occurrence may overlap the end");
        assert!(draft(&[3, 1, 2, 3], 4).is_empty(), "one token is no match");
        for history in [&[][..], &[1], &[1, 1], &[1, 2, 1]] {
            assert!(draft(history, 7).is_empty(), "{history:?}");
        }
        assert!(draft(&[6, 6, 6], 0).is_empty());
    }

    #[test]
    fn room_ends_with_the_context_and_the_tokens_wanted() {
        assert_eq!(room(10, 12, 1, 100), 1, "a draft at 11, none at 12");
        assert_eq!(room(11, 12, 1, 100), 0);
        assert_eq!(room(12, 12, 1, 100), 0);
        assert_eq!(room(0, 100, 5, 8), 2, "tokens 6, 7 and 8");
        assert_eq!(room(0, 100, 8, 8), 0);
    }

    #[test]
    fn failures_double_the_wait_and_success_ends_it() {
        let mut pace = Pace::default();
        assert!(pace.next(0, 0), "nothing has failed yet");
        for wait in [1, 2, 4, 8, 16, 32, 64, 64, 64] {
            let without = (0..).take_while(|i| !pace.next(if *i == 0 { 7 } else { 0 }, 0)).count();
            assert_eq!(without, wait);
        }
        assert!(pace.next(7, 1));
        assert_eq!(pace, Pace::default());
    }
}
