//! Turns the bytes of tokens, as they come, into text that may be printed.
//!
//! Two things are held back: an incomplete UTF-8 sequence (a token may end in the middle of a character) and the
//! possible beginning of a stop string. All pieces joined are what decoding everything at once gives, up to the
//! first stop string; how the text was cut into tokens makes no difference.
//!
//! Cost: proportional to the bytes pushed times the stop strings. Holds at most the longest stop string and the
//! three bytes of an unfinished character between two calls.

/// What a [`TextStream`] lets out for one token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamStep {
    /// Text that became printable; may be empty.
    pub text: String,
    /// A stop string was completed: `text` is what stood before it, and nothing will follow.
    pub stopped: bool,
}

/// An incremental UTF-8 decoder that watches for stop strings.
#[derive(Debug, Clone)]
pub struct TextStream {
    stop: Vec<String>,
    /// Beginning of a character, at most 3 bytes.
    incomplete: Vec<u8>,
    /// Decoded, but possibly the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends at the first of `stop` to be completed. Empty strings are ignored.
    #[must_use]
    pub fn new(stop: &[String]) -> Self {
        let stop = stop.iter().filter(|s| !s.is_empty()).cloned().collect();
        TextStream { stop, incomplete: Vec::new(), held: String::new(), stopped: false }
    }

    /// Takes the bytes of one token and returns what may be printed. Bytes that can never be UTF-8 become U+FFFD.
    /// After a stop string was found every call returns no text and `stopped`.
    pub fn push(&mut self, bytes: &[u8]) -> StreamStep {
        if self.stopped {
            return StreamStep { text: String::new(), stopped: true };
        }
        self.incomplete.extend_from_slice(bytes);
        self.decode_complete();
        if let Some(step) = self.take_until_stop() {
            return step;
        }
        let rest = self.held.split_off(self.releasable());
        StreamStep { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Everything still held back: an unfinished character as one U+FFFD, and the beginning of a stop string that
    /// was not completed. Empty after a stop string.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        if !self.incomplete.is_empty() {
            self.incomplete.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        match self.take_until_stop() {
            Some(step) => step.text,
            None => std::mem::take(&mut self.held),
        }
    }

    /// Moves every complete character from `incomplete` to `held`.
    fn decode_complete(&mut self) {
        let bytes = std::mem::take(&mut self.incomplete);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let Err(error) = std::str::from_utf8(rest).map(|text| self.held.push_str(text)) else {
                return;
            };
            let (valid, tail) = rest.split_at(error.valid_up_to());
            self.held.push_str(&String::from_utf8_lossy(valid));
            let Some(bad) = error.error_len() else {
                self.incomplete = tail.to_vec();
                return;
            };
            self.held.push(char::REPLACEMENT_CHARACTER);
            rest = &tail[bad..];
        }
    }

    /// If `held` contains a stop string: the text before it. The one completed first counts, as if the text had
    /// come character by character; of several completed by the same character, the longest.
    fn take_until_stop(&mut self) -> Option<StreamStep> {
        let found = self.stop.iter().filter_map(|s| self.held.find(s).map(|start| (start + s.len(), start)));
        let (_, start) = found.min()?;
        self.stopped = true;
        let mut text = std::mem::take(&mut self.held);
        text.truncate(start);
        Some(StreamStep { text, stopped: true })
    }

    /// Length of the part of `held` that cannot belong to a stop string: up to the longest end of `held` that is
    /// the beginning of one.
    fn releasable(&self) -> usize {
        let begins_stop = |i: &usize| self.stop.iter().any(|s| s.starts_with(&self.held[*i..]));
        let starts = self.held.char_indices().map(|(i, _)| i);
        starts.into_iter().find(begins_stop).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::TextStream;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn stop_strings_end_a_stream_wherever_it_is_cut(
            text in "[ab\n🦊é]{0,24}",
            stop in proptest::collection::vec("[ab\n🦊]{1,4}", 0..4),
            cuts in proptest::collection::vec(1usize..5, 24 * 4),
        ) {
            // Truth: character by character, the first stop string to be completed, the longest of those that are.
            let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
            let wanted = ends.filter_map(|end| {
                let completed = stop.iter().filter(|s| text[..end].ends_with(s.as_str()));
                completed.max_by_key(|s| s.len()).map(|s| &text[..end - s.len()])
            }).next();

            let mut stream = TextStream::new(&stop);
            let (mut joined, mut stopped, mut rest) = (String::new(), false, text.as_bytes());
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                rest = tail;
                let step = stream.push(piece);
                prop_assert!(!stopped || (step.stopped && step.text.is_empty()), "text after the stop");
                stopped = step.stopped;
                joined.push_str(&step.text);
            }
            prop_assert!(rest.is_empty());
            joined.push_str(&stream.finish());
            prop_assert_eq!(stopped, wanted.is_some());
            prop_assert_eq!(joined, wanted.unwrap_or(&text));
            prop_assert_eq!(stream.finish(), "");
        }

        #[test]
        fn a_stream_lets_go_of_all_it_can(text in "[ab\n🦊é]{0,24}", stop in "[ab\n]{1,4}") {
            // Held back is at most what could still become the stop string: otherwise a reader would wait for nothing.
            let mut stream = TextStream::new(std::slice::from_ref(&stop));
            let mut shown = String::new();
            for (i, c) in text.char_indices() {
                let mut utf8 = [0; 4];
                let step = stream.push(c.encode_utf8(&mut utf8).as_bytes());
                shown.push_str(&step.text);
                if step.stopped {
                    break;
                }
                let held = text[..i + c.len_utf8()].strip_prefix(&shown).unwrap();
                prop_assert!(held.len() < stop.len() && stop.starts_with(held), "{:?} held for {:?}", held, stop);
            }
        }
    }
}
