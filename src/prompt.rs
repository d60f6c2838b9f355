//! How a user's words become the text the model continues, and what ends its answer.
//!
//! Falcon-7B-Instruct has no special chat tokens: a conversation is plain text with `User:` and `Assistant:`. Two
//! forms are in use, and they tokenise differently: the model card's with single newlines, and the chat template
//! published later with blank lines.

use std::str::FromStr;

use crate::error::{Error, Result};

/// The card's preamble.
const CARD_SYSTEM: &str = "A helpful assistant who helps the user with any questions asked.";

/// Falcon's `<|endoftext|>`.
pub const END_OF_TEXT: u32 = 11;

/// A prompt format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// `A helpful assistant ...\nUser: {user}\nAssistant:`, as on the GPTQ checkpoint's model card.
    Card,
    /// `\n\nUser: {user}\n\nAssistant:`, as in the upstream tokenizer's chat template, without a system text.
    Upstream,
    /// The user's text as it is.
    None,
}

/// A question and, unless it is the one to be answered, its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// What the user said.
    pub user: String,
    /// What the model answered; `None` for the last turn.
    pub assistant: Option<String>,
}

impl Template {
    /// The prompt for a single question.
    #[must_use]
    pub fn prompt(self, user: &str) -> String {
        match self {
            Template::Card => format!("{CARD_SYSTEM}{}", self.next_turn(user)),
            Template::Upstream | Template::None => self.next_turn(user),
        }
    }

    /// The prompt for the last of `turns`, with those before it as history. Answers are trimmed: the blank behind
    /// `Assistant:` belongs to the format.
    #[must_use]
    pub fn conversation(self, turns: &[Turn]) -> String {
        let mut text = String::new();
        for (i, turn) in turns.iter().enumerate() {
            text.push_str(&if i == 0 { self.prompt(&turn.user) } else { self.next_turn(&turn.user) });
            if let Some(answer) = &turn.assistant {
                text.push_str(&self.answer(answer));
            }
        }
        text
    }

    /// What to append for the next question when the history, up to the end of the last answer, is already in the
    /// session.
    #[must_use]
    pub fn next_turn(self, user: &str) -> String {
        match self {
            Template::Card => format!("\nUser: {user}\nAssistant:"),
            Template::Upstream => format!("\n\nUser: {}\n\nAssistant:", upstream_content(user)),
            Template::None => user.to_owned(),
        }
    }

    /// Texts that end an answer: the model otherwise goes on to write the user's next question itself. The blank
    /// lines of `upstream` contain it too.
    #[must_use]
    pub fn stop_strings(self) -> &'static [&'static str] {
        match self {
            Template::Card | Template::Upstream => &["\nUser"],
            Template::None => &[],
        }
    }

    /// An answer as it stands behind `Assistant:`.
    fn answer(self, answer: &str) -> String {
        match self {
            Template::Card => format!(" {}", answer.trim()),
            Template::Upstream => format!(" {}", upstream_content(answer)),
            Template::None => answer.to_owned(),
        }
    }
}

impl FromStr for Template {
    type Err = Error;

    fn from_str(name: &str) -> Result<Template> {
        match name {
            "card" => Ok(Template::Card),
            "upstream" => Ok(Template::Upstream),
            "none" => Ok(Template::None),
            _ => {
                let name = crate::error::one_line(name);
                Err(Error::Usage(format!("--template {name}: wanted card, upstream or none")))
            }
        }
    }
}

/// The upstream template keeps blank lines for itself.
fn upstream_content(text: &str) -> String {
    text.trim().replace("\r\n", "\n").replace("\n\n", "\n")
}

/// Ids that end an answer: `<|endoftext|>` (11), Falcon's other special tokens (0 to 10, which an instruct model
/// writes only when it has lost its way), and the checkpoint's own `eos_token_id`s. Rising, below `vocab_size`.
///
/// `config_eos` must already be free of the wrong default pair bos 1 / eos 2 (see `config`); 1 and 2 end an answer
/// here anyway, being special tokens.
#[must_use]
pub fn default_stop_ids(config_eos: &[u32], vocab_size: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..=END_OF_TEXT).chain(config_eos.iter().copied()).collect();
    ids.retain(|&id| (id as usize) < vocab_size);
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(user: &str, assistant: Option<&str>) -> Turn {
        Turn { user: user.into(), assistant: assistant.map(Into::into) }
    }

    #[test]
    fn card_prompt_is_the_card_s() {
        assert_eq!(
            Template::Card.prompt("Tell me about AI"),
            "A helpful assistant who helps the user with any questions asked.\nUser: Tell me about AI\nAssistant:"
        );
    }

    #[test]
    fn upstream_keeps_blank_lines_for_itself() {
        assert_eq!(Template::Upstream.prompt(" a\r\n\r\nb\n"), "\n\nUser: a\nb\n\nAssistant:");
    }

    #[test]
    fn none_changes_nothing() {
        assert_eq!(Template::None.prompt(" as it is\n"), " as it is\n");
        assert!(Template::None.stop_strings().is_empty());
    }

    #[test]
    fn a_conversation_is_what_the_session_would_hold() {
        for template in [Template::Card, Template::Upstream, Template::None] {
            let turns = [turn("Hello", Some(" Hi.")), turn("Who are you?", None)];
            let held = template.prompt("Hello") + " Hi." + &template.next_turn("Who are you?");
            assert_eq!(template.conversation(&turns), held, "{template:?}");
        }
    }

    #[test]
    fn a_model_that_writes_the_next_question_is_stopped() {
        for template in [Template::Card, Template::Upstream] {
            let next = template.next_turn("x");
            assert!(template.stop_strings().iter().any(|stop| next.contains(stop)), "{template:?}");
        }
    }

    #[test]
    fn names_are_parsed_and_others_refused() {
        assert_eq!("card".parse(), Ok(Template::Card));
        assert_eq!("upstream".parse(), Ok(Template::Upstream));
        assert_eq!("none".parse(), Ok(Template::None));
        assert!(matches!("Card".parse::<Template>(), Err(Error::Usage(_))));
    }

    #[test]
    fn stop_ids_are_the_special_tokens_and_the_checkpoint_s() {
        assert_eq!(default_stop_ids(&[11], 65024), (0..=11).collect::<Vec<_>>());
        assert_eq!(default_stop_ids(&[70, 65024], 65024).last(), Some(&70));
        assert_eq!(default_stop_ids(&[], 4), [0, 1, 2, 3]);
    }
}
