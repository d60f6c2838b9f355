//! Text to token ids and back: Falcon's byte-level BPE.
//!
//! Encoding is the `tokenizers` crate's, built from a checked `tokenizer.json` (see `json.rs`): special tokens are
//! cut out first, the rest goes through punctuation, the GPT-2 pattern, digits, groups of three digits, then BPE.
//! No token is ever added at the beginning or the end. Decoding is a table of each id's bytes; 28 byte values
//! have no token in Falcon's vocabulary and vanish when encoded, so a round trip is not always exact.
//!
//! Cost: loading takes some 0.1 s and 30 MB for Falcon's 65024 tokens; decoding allocates its result only.
//! Limits: texts of at most 512 KiB (the context of 2048 tokens holds far less).

mod json;
mod stream;

use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

pub use stream::{StreamStep, TextStream};

/// The GPT-2 pattern's engine gives up, silently, after a million steps back within one run of blanks; a text
/// this long cannot reach that.
const MAX_TEXT_BYTES: usize = 512 << 10;

/// A loaded tokenizer. Immutable; may be used by several threads at once.
pub struct Tokenizer {
    /// Encodes plain text; knows no added tokens.
    plain: tokenizers::Tokenizer,
    added: Vec<json::AddedToken>,
    /// Bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id]..starts[id + 1]]`; one more entry than tokens.
    starts: Vec<usize>,
    /// By id.
    special: Vec<bool>,
}

impl Tokenizer {
    /// Builds a tokenizer from the contents of a `tokenizer.json`; `file` is its name for messages.
    ///
    /// # Errors
    /// [`Error::Model`] if the file is damaged or is not a Falcon tokenizer.
    pub fn from_json(bytes: &[u8], file: &Path) -> Result<Tokenizer> {
        let definition = json::parse(bytes, file)?;
        let (token_bytes, starts) = token_table(&definition.tokens);
        let mut special = vec![false; definition.tokens.len()];
        for token in definition.added.iter().filter(|t| t.special) {
            special[token.id as usize] = true;
        }
        let plain = plain_encoder(definition.tokens, definition.model_len, definition.merges);
        let plain = plain.map_err(|e| Error::model(file, e))?;
        Ok(Tokenizer { plain, added: definition.added, bytes: token_bytes, starts, special })
    }

    /// Token ids of `text`. With `special`, special tokens written in the text (`<|endoftext|>`) become their id;
    /// without, they are text like any other, so that a user's words cannot end or restructure a prompt.
    ///
    /// # Errors
    /// [`Error::Usage`] if the text is longer than 512 KiB.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::Usage(format!(
                "tokenizer: a text of {} bytes, at most {MAX_TEXT_BYTES} are taken; shorten it",
                text.len()
            )));
        }
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((start, token)) = self.next_added(rest, special) {
            self.encode_plain(&rest[..start], &mut ids)?;
            ids.push(token.id);
            rest = &rest[start + token.content.len()..];
        }
        self.encode_plain(rest, &mut ids)?;
        Ok(ids)
    }

    /// Text of `ids`, all at once. Bytes that are not UTF-8 become U+FFFD, unknown ids nothing; special tokens are
    /// written out unless `skip_special`. For text that comes token by token see [`TextStream`].
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let shown = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let bytes: Vec<u8> = shown.filter_map(|&id| self.token_bytes(id)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Number of tokens: ids are `0..vocab_size()`.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.special.len()
    }

    /// Whether `id` is a special token (Falcon's are 0 to 11).
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The bytes token `id` stands for, possibly a part of a character; `None` for an unknown id.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        self.bytes.get(*self.starts.get(id)?..*self.starts.get(id + 1)?)
    }

    /// The leftmost added token in `text`, and of several that begin there the longest.
    fn next_added(&self, text: &str, special: bool) -> Option<(usize, &json::AddedToken)> {
        let wanted = || self.added.iter().filter(|t| special || !t.special);
        text.char_indices().find_map(|(start, _)| {
            let here = wanted().filter(|t| text[start..].starts_with(&t.content));
            here.max_by_key(|t| t.content.len()).map(|token| (start, token))
        })
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if !text.is_empty() {
            let encoding = self.plain.encode_fast(text, false);
            let encoding =
                encoding.map_err(|e| Error::Io(crate::error::one_line(&format!("tokenizer: {e}"))))?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }
}

/// Falcon's pipeline around the file's BPE model.
fn plain_encoder(
    mut tokens: Vec<String>,
    model_len: usize,
    merges: Vec<(String, String)>,
) -> tokenizers::Result<tokenizers::Tokenizer> {
    tokens.truncate(model_len);
    let vocab: Vocab = tokens.into_iter().zip(0u32..).collect();
    // Without a cache: it is per thread and outlives the tokenizer, and a prompt is encoded once.
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).cache_capacity(0).build()?;
    let three_digits = SplitPattern::Regex("[0-9][0-9][0-9]".into());
    let steps = Sequence::new(vec![
        PreTokenizerWrapper::Punctuation(Punctuation::new(SplitDelimiterBehavior::Contiguous)),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
        PreTokenizerWrapper::Digits(Digits::new(false)),
        PreTokenizerWrapper::Split(Split::new(three_digits, SplitDelimiterBehavior::Isolated, false)?),
    ]);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(steps));
    Ok(tokenizer)
}

/// The bytes of every token, concatenated, and where each begins. A token with a character that is not in the
/// byte alphabet (an added token with a blank, say) stands for its own UTF-8, as in the `tokenizers` crate.
fn token_table(tokens: &[String]) -> (Vec<u8>, Vec<usize>) {
    let alphabet = byte_of_char();
    let mut bytes = Vec::new();
    let mut starts = vec![0];
    for token in tokens {
        let mapped: Option<Vec<u8>> =
            token.chars().map(|c| alphabet.get(c as usize).copied().flatten()).collect();
        match mapped {
            Some(mapped) => bytes.extend_from_slice(&mapped),
            None => bytes.extend_from_slice(token.as_bytes()),
        }
        starts.push(bytes.len());
    }
    (bytes, starts)
}

/// GPT-2's byte alphabet, inverted. Printable Latin-1 bytes stand for themselves; the other 68, in order, are the
/// characters from U+0100 on.
fn byte_of_char() -> [Option<u8>; 324] {
    let mut byte_of = [None; 324];
    let mut next = 256;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            byte_of[usize::from(byte)] = Some(byte);
        } else {
            byte_of[next] = Some(byte);
            next += 1;
        }
    }
    byte_of
}
