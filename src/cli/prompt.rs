//! Where the prompt comes from: `-p`, a file, stdin, or a JSON list of token ids.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use peregrine::error::one_line;
use peregrine::{Error, Result};

use super::args::Args;
use super::output;

/// Far beyond any context (2048 tokens of at most some dozen bytes each), and little memory.
const MAX_PROMPT_BYTES: u64 = 4 << 20;

/// `-p`, `-f`, `--ids`, `--special`.
#[derive(Default)]
pub(super) struct PromptFlags {
    source: Option<Source>,
    /// Special tokens in the text are tokens, not text.
    pub(super) special: bool,
}

enum Source {
    Text(String),
    Stdin,
    File(PathBuf),
    Ids(PathBuf),
}

/// A prompt as given.
pub(super) enum Prompt {
    /// UTF-8 text, without template.
    Text(String),
    /// Token ids, not yet checked against the vocabulary.
    Ids(Vec<u32>),
}

/// The help of these options.
pub(super) const HELP: &str = "  -p, --prompt TEXT         the prompt; - or none of these three: stdin
  -f, --file FILE           the prompt is the text of FILE (one line end at its end is dropped)
      --ids FILE            the prompt is a JSON list of token ids, used as they are
      --special             <|endoftext|>, >>TITLE<< and so on in the text are tokens, not text
";

impl PromptFlags {
    /// Takes `option` if it is one of these.
    pub(super) fn take(&mut self, option: &str, args: &mut Args) -> Result<bool> {
        let source = match option {
            "-p" | "--prompt" => match args.text()? {
                dash if dash == "-" => Source::Stdin,
                text => Source::Text(text),
            },
            "-f" | "--file" => Source::File(args.path()?),
            "--ids" => Source::Ids(args.path()?),
            "--special" => {
                self.special = true;
                return Ok(true);
            }
            _ => return Ok(false),
        };
        match self.source.replace(source) {
            None => Ok(true),
            Some(_) => Err(args.wrong("more than one prompt: give one of -p, -f and --ids, once")),
        }
    }

    /// Reads the prompt.
    ///
    /// # Errors
    /// [`Error::Usage`] when it cannot be read, is not UTF-8, is too long, or is not a list of ids.
    pub(super) fn read(&self) -> Result<Prompt> {
        match &self.source {
            Some(Source::Text(text)) => Ok(Prompt::Text(text.clone())),
            Some(Source::File(file)) => Ok(Prompt::Text(without_line_end(read(open(file)?, &name(file))?))),
            Some(Source::Ids(file)) => Ok(Prompt::Ids(ids(&read(open(file)?, &name(file))?, &name(file))?)),
            Some(Source::Stdin) | None => {
                if io::stdin().is_terminal() {
                    output::note("reading the prompt from the terminal; end it with Ctrl-D, or use -p TEXT");
                }
                Ok(Prompt::Text(without_line_end(read(io::stdin().lock(), "stdin")?)))
            }
        }
    }
}

fn name(file: &Path) -> String {
    one_line(&file.display().to_string())
}

fn open(file: &Path) -> Result<File> {
    File::open(file)
        .map_err(|error| Error::Usage(format!("cannot read the prompt from {}: {error}", name(file))))
}

/// All of `from` as UTF-8.
fn read(from: impl Read, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    from.take(MAX_PROMPT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::Usage(format!("cannot read the prompt from {name}: {error}")))?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Error::Usage(format!(
            "the prompt in {name} is longer than {} MiB",
            MAX_PROMPT_BYTES >> 20
        )));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::Usage(format!("the prompt in {name} is not UTF-8 at byte {at}"))
    })
}

/// Editors and `echo` end a text with a line end that is not meant as part of the prompt.
fn without_line_end(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

fn ids(json: &str, name: &str) -> Result<Vec<u32>> {
    serde_json::from_str(json).map_err(|error| {
        Error::Usage(format!("--ids {name}: expected a JSON list of token ids like [9856, 204]: {error}"))
    })
}
