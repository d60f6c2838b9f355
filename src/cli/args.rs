//! Reads a subcommand's words: options, their values, and errors that say what to type instead.
//!
//! The help text of the command is the list of its options; a mistyped one is compared with it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use peregrine::error::one_line;
use peregrine::{Error, Result};

/// The words after a subcommand, taken one at a time.
pub(super) struct Args {
    parser: lexopt::Parser,
    command: &'static str,
    help: &'static [&'static str],
    /// The option whose value is asked for next, with its dashes.
    option: String,
}

/// One word of the command line.
pub(super) enum Word {
    /// An option with its dashes: `--seed`, `-n`.
    Option(String),
    /// Anything else.
    Value(OsString),
}

impl Args {
    /// `help`, printed one part after the other, must name every option of the command.
    pub(super) fn new(command: &'static str, help: &'static [&'static str], words: Vec<OsString>) -> Args {
        Args { parser: lexopt::Parser::from_args(words), command, help, option: String::new() }
    }

    /// The next option or value; `None` at the end, and after `--help`, which is answered here.
    pub(super) fn next(&mut self) -> Result<Option<Word>> {
        let option = match self.parser.next() {
            Err(error) => return Err(self.wrong(&error.to_string())),
            Ok(None) => return Ok(None),
            Ok(Some(lexopt::Arg::Value(value))) => return Ok(Some(Word::Value(value))),
            Ok(Some(lexopt::Arg::Short(short))) => format!("-{short}"),
            Ok(Some(lexopt::Arg::Long(long))) => format!("--{long}"),
        };
        self.option.clone_from(&option);
        Ok(Some(Word::Option(option)))
    }

    /// The value of the option just returned.
    fn value(&mut self) -> Result<OsString> {
        self.parser
            .value()
            .map_err(|_| Error::Usage(format!("{} needs a value ({})", self.option, self.see())))
    }

    /// The option's value as text.
    pub(super) fn text(&mut self) -> Result<String> {
        self.value()?
            .into_string()
            .map_err(|_| Error::Usage(format!("the value of {} is not UTF-8", self.option)))
    }

    /// A value that is no option's as text; `name` is what the help calls it.
    pub(super) fn utf8(&self, value: OsString, name: &str) -> Result<String> {
        value.into_string().map_err(|_| self.wrong(&format!("{name} is not UTF-8")))
    }

    /// The option's value as a path.
    pub(super) fn path(&mut self) -> Result<PathBuf> {
        Ok(self.value()?.into())
    }

    /// The option's value parsed; `wanted` describes it in the error ("a number from 0 up").
    pub(super) fn parse<T: FromStr>(&mut self, wanted: &str) -> Result<T> {
        let text = self.text()?;
        text.trim().parse().map_err(|_| self.bad_value(&text, wanted))
    }

    /// The error for a value that is not what `wanted` says.
    pub(super) fn bad_value(&self, value: &str, wanted: &str) -> Error {
        Error::Usage(format!("{} is '{}': expected {wanted}", self.option, one_line(value)))
    }

    /// Prints the command's help.
    pub(super) fn print_help(&self) -> Result<()> {
        super::output::print(&self.help.concat())
    }

    /// The error for a word the command does not know.
    pub(super) fn unknown(&self, word: Word) -> Error {
        match word {
            Word::Value(value) => {
                self.wrong(&format!("unexpected argument '{}'", one_line(&value.to_string_lossy())))
            }
            Word::Option(option) => match nearest(&option, self.help.iter().flat_map(|part| options(part))) {
                Some(near) => {
                    self.wrong(&format!("unknown option {}: did you mean {near}?", one_line(&option)))
                }
                None => self.wrong(&format!("unknown option {}", one_line(&option))),
            },
        }
    }

    /// A usage error of this command.
    pub(super) fn wrong(&self, what: &str) -> Error {
        Error::Usage(format!("{}: {} ({})", self.command, one_line(what), self.see()))
    }

    fn see(&self) -> String {
        format!("peregrine {} --help", self.command)
    }
}

/// The long options a help text names.
fn options(help: &str) -> impl Iterator<Item = &str> {
    let ends_option = |c: char| c.is_whitespace() || ",[](){}|=.".contains(c);
    help.split(ends_option).filter(|word| word.len() > 2 && word.starts_with("--"))
}

/// The candidate most like `word`, if one is close enough to be what was meant.
pub(super) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A third of the letters may be wrong: --temprature finds --temperature, --foo finds nothing.
    let limit = word.trim_start_matches('-').chars().count().div_ceil(3);
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|&(distance, _)| distance <= limit)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Letters to insert, delete or replace to turn `a` into `b` (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_option_finds_its_neighbour() {
        let help = "  -n, --max-new-tokens N\n      --temperature T (--temp)\n      --top-p P, --top-k K\n";
        assert_eq!(nearest("--temprature", options(help)), Some("--temperature"));
        assert_eq!(nearest("--max_new_tokens", options(help)), Some("--max-new-tokens"));
        assert_eq!(nearest("--foo", options(help)), None);
    }

    #[test]
    fn distance_counts_edits() {
        for (a, b, edits) in
            [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("é", "e", 1)]
        {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }
}
