//! `peregrine chat`: a conversation on the terminal, or one line of stdin a turn.
//!
//! The session keeps the conversation: a turn costs only its own tokens.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};

use peregrine::engine::{Engine, Session};
use peregrine::error::one_line;
use peregrine::prompt::Template;
use peregrine::sampler::Sampling;
use peregrine::{Error, Result};

use super::args::{Args, Word};
use super::model::{self, ModelFlags};
use super::report::Report;
use super::sampling::{self, SamplingFlags};
use super::{interrupt, output};

pub(super) const HELP: &[&str] = &[
    "\
Talks, turn by turn. Each line of stdin is one turn; the answer goes to stdout.

Usage: peregrine chat [-m MODEL] [OPTIONS]

",
    COMMANDS,
    "\n",
    sampling::HELP,
    model::HELP,
];

const COMMANDS: &str = "  /reset                    forget the conversation
  /save FILE                write the conversation to a new file
  /help                     print this
  /exit                     end (so does Ctrl-D)
  Ctrl-C                    stops an answer and keeps the chat; ends the chat while it waits
";

/// Longer lines than this are not typed by people.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// Runs the command.
pub(super) fn run(mut args: Args) -> Result<()> {
    let mut model = ModelFlags::new();
    let mut flags = SamplingFlags::default();
    while let Some(word) = args.next()? {
        match word {
            Word::Option(option) if option == "-h" || option == "--help" => return args.print_help(),
            Word::Option(option) if model.take(&option, &mut args)? || flags.take(&option, &mut args)? => {}
            other => return Err(args.unknown(other)),
        }
    }
    if let Some(note) = flags.note() {
        model.say(&note);
    }
    flags.check()?;
    interrupt::install()?;
    let engine = model.load()?;
    engine.tokenizer()?;
    let template = flags.template(&engine);
    let sampling = flags.with_stops_of(template);
    let session = model.session(&engine)?;
    let mut chat =
        Chat { engine: &engine, session, template, sampling, turns: Vec::new(), quiet: model.quiet };

    let interactive = io::stdin().is_terminal();
    if interactive {
        model.say(&format!("on {}; /help lists the commands", engine.device_name()));
    }
    loop {
        if interactive {
            output::ask("> ");
        }
        let Some(line) = read_line()? else { break };
        match line.split_once(' ').map_or((line.as_str(), ""), |(word, rest)| (word, rest.trim())) {
            ("", "") => {}
            ("/exit" | "/quit", "") => return Ok(()),
            ("/help", "") => output::ask(COMMANDS),
            ("/reset", "") => chat.reset()?,
            ("/save", file) => chat.save(file),
            (word, _) if word.starts_with('/') => {
                output::note(&format!("unknown command {}: /help lists them", one_line(word)));
            }
            _ => chat.answer(line)?,
        }
    }
    if interactive {
        output::ask("\n");
    }
    Ok(())
}

/// The next line of stdin without its end; `None` at the end of stdin. Bytes that are not UTF-8 become U+FFFD.
fn read_line() -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let mut stdin = io::stdin().lock().take(MAX_LINE_BYTES);
    let read = stdin.read_until(b'\n', &mut bytes).map_err(|error| Error::Io(format!("stdin: {error}")))?;
    if read as u64 == MAX_LINE_BYTES && bytes.last() != Some(&b'\n') {
        return Err(Error::Usage(format!("a line of stdin is longer than {} MiB", MAX_LINE_BYTES >> 20)));
    }
    Ok((read > 0).then(|| String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_string()))
}

struct Chat<'e> {
    engine: &'e Engine,
    session: Session,
    template: Template,
    sampling: Sampling,
    /// What was said and answered, for `/save`.
    turns: Vec<(String, String)>,
    quiet: bool,
}

impl Chat<'_> {
    fn reset(&mut self) -> Result<()> {
        self.turns.clear();
        self.session.reset()
    }

    /// Generates and prints the answer to `user`. A turn that is refused (no room in the context) is a note and
    /// leaves no trace: the chat goes on.
    fn answer(&mut self, user: String) -> Result<()> {
        let first = self.session.tokens().is_empty();
        let prompt = if first { self.template.prompt(&user) } else { self.template.next_turn(&user) };
        let watch = interrupt::watch();
        let mut generation = match self.session.generate(&prompt, &self.sampling) {
            Err(Error::Usage(what)) => {
                output::note(&format!("{what} (/reset forgets the conversation)"));
                return Ok(());
            }
            other => other?,
        };
        let mut text = String::new();
        for token in generation.by_ref() {
            let token = token?;
            // The model begins its answer with a blank, as the template ends with a colon.
            let shown = if text.trim().is_empty() { token.text.trim_start() } else { &token.text };
            if !shown.is_empty() {
                output::print(&output::printable(shown))?;
            }
            text.push_str(&token.text);
            if watch.requested() {
                break;
            }
        }
        output::print("\n")?;
        if !self.quiet {
            let (stats, stop) = (generation.stats(), generation.stop_reason());
            output::note(&Report { engine: self.engine, sampling: &self.sampling, stats, stop }.line());
        }
        self.turns.push((user, text));
        Ok(())
    }

    /// Writes the conversation to a new file. Failure is a note: the chat goes on.
    fn save(&self, file: &str) {
        if file.is_empty() {
            return output::note("/save needs a file name");
        }
        let mut text = String::new();
        for (user, answer) in &self.turns {
            text.push_str(&format!("User: {user}\nAssistant: {}\n", answer.trim()));
        }
        let written = File::create_new(file).and_then(|mut out| out.write_all(text.as_bytes()));
        match written {
            Ok(()) => output::note(&format!("saved {} turns to {}", self.turns.len(), one_line(file))),
            Err(error) => output::note(&format!("cannot save to {}: {error}", one_line(file))),
        }
    }
}
