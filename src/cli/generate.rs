//! `peregrine generate`: continues a prompt, each token printed as soon as it is known.

use peregrine::Result;
use peregrine::engine::{Engine, Generation, Session, StopReason, Token};
use peregrine::prompt::Template;
use peregrine::sampler::Sampling;

use super::args::{Args, Word};
use super::model::{self, ModelFlags};
use super::prompt::{self, Prompt, PromptFlags};
use super::report::Report;
use super::sampling::{self, SamplingFlags};
use super::{interrupt, output};

pub(super) const HELP: &[&str] = &[
    "\
Continues a text. The text goes to stdout as it is made, figures to stderr.

Usage: peregrine generate [-m MODEL] [-p TEXT | -f FILE | --ids FILE] [OPTIONS]

",
    prompt::HELP,
    sampling::HELP,
    "      --echo                print the prompt before its continuation
      --json                one JSON object a token {id, text, logprob}, and a last one with the figures
",
    model::HELP,
];

/// Runs the command.
pub(super) fn run(mut args: Args) -> Result<()> {
    let mut model = ModelFlags::new();
    let mut prompt = PromptFlags::default();
    let mut flags = SamplingFlags::default();
    let (mut json, mut echo) = (false, false);
    while let Some(word) = args.next()? {
        match word {
            Word::Option(option) if option == "-h" || option == "--help" => return args.print_help(),
            Word::Option(option) if option == "--json" => json = true,
            Word::Option(option) if option == "--echo" => echo = true,
            Word::Option(option)
                if model.take(&option, &mut args)?
                    || prompt.take(&option, &mut args)?
                    || flags.take(&option, &mut args)? => {}
            other => return Err(args.unknown(other)),
        }
    }
    if let Some(note) = flags.note() {
        model.say(&note);
    }
    flags.check()?;
    interrupt::install()?;
    let prompt_text = prompt.read()?;
    let engine = model.load()?;
    // Ids are used as they are: no template, and none of its stop strings.
    let template =
        if matches!(prompt_text, Prompt::Ids(_)) { Template::None } else { flags.template(&engine) };
    let sampling = flags.with_stops_of(template);
    let loaded_seconds = model::seconds_running();
    let mut session = model.session(&engine)?;
    let session_seconds = model::seconds_running() - loaded_seconds;
    let echoed = match &prompt_text {
        Prompt::Text(text) if echo && !json => text.clone(),
        _ => String::new(),
    };

    let watch = interrupt::watch();
    let mut generation = start(&engine, &mut session, prompt_text, template, prompt.special, &sampling)?;
    output::print(&output::printable(&echoed))?;
    let mut first_token_seconds = None;
    let mut printer = Printer::new(json, engine.tokenizer().is_err());
    for token in generation.by_ref() {
        printer.print(&token?)?;
        first_token_seconds.get_or_insert_with(model::seconds_running);
        if watch.requested() {
            break;
        }
    }
    // An answer that was complete when Ctrl-C came is complete.
    let stop: Option<StopReason> = generation.stop_reason();
    let report = Report { engine: &engine, sampling: &sampling, stats: generation.stats(), stop };
    printer.end(&report)?;
    if !model.quiet && !json {
        output::note(&report.line());
    }
    if let (true, Some(seconds)) = (model.verbose, first_token_seconds) {
        model.say(&format!(
            "first token {:.1} ms after the program began: load {:.1}, session {:.1}, prompt and first step {:.1} ms",
            seconds * 1e3,
            loaded_seconds * 1e3,
            session_seconds * 1e3,
            (seconds - loaded_seconds - session_seconds) * 1e3
        ));
    }
    if stop.is_none() { watch.check() } else { Ok(()) }
}

/// Begins the generation.
fn start<'s>(
    engine: &Engine,
    session: &'s mut Session,
    prompt: Prompt,
    template: Template,
    special: bool,
    sampling: &Sampling,
) -> Result<Generation<'s>> {
    match prompt {
        Prompt::Ids(ids) => session.generate_ids(&ids, sampling),
        Prompt::Text(text) => {
            let text = template.prompt(&text);
            if special {
                session.generate_ids(&engine.tokenizer()?.encode(&text, true)?, sampling)
            } else {
                session.generate(&text, sampling)
            }
        }
    }
}

/// Writes tokens to stdout in the form asked for.
struct Printer {
    json: bool,
    /// The checkpoint has no tokenizer: print ids.
    ids: bool,
    /// Whether the last thing printed ended a line.
    at_line_start: bool,
}

impl Printer {
    fn new(json: bool, ids: bool) -> Printer {
        Printer { json, ids, at_line_start: true }
    }

    fn print(&mut self, token: &Token) -> Result<()> {
        if self.json {
            let line = serde_json::json!({ "id": token.id, "text": token.text, "logprob": token.logprob });
            return output::print(&format!("{line}\n"));
        }
        if self.ids {
            self.at_line_start = false;
            return output::print(&format!("{} ", token.id));
        }
        if let Some(last) = token.text.chars().last() {
            self.at_line_start = last == '\n';
            output::print(&output::printable(&token.text))?;
        }
        Ok(())
    }

    fn end(&self, report: &Report<'_>) -> Result<()> {
        if self.json {
            output::print(&format!("{}\n", report.json()))
        } else if self.at_line_start {
            Ok(())
        } else {
            output::print("\n")
        }
    }
}
