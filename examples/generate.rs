//! Streams an answer: `cargo run --example generate -- MODEL "Once upon a time"`.

use std::io::Write;

use peregrine::engine::{Engine, LoadOptions, SessionOptions};
use peregrine::sampler::Sampling;

fn main() -> peregrine::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().unwrap_or_else(|| "models/tiny-falcon-tales".to_owned());
    let prompt = arguments.next().unwrap_or_else(|| "Once upon a time".to_owned());

    let engine = Engine::load(&model, &LoadOptions::default())?;
    let mut session = engine.session(SessionOptions::default())?;
    let mut answer = session.generate(&prompt, &Sampling::greedy().max_new_tokens(64))?;
    for token in answer.by_ref() {
        print!("{}", token?.text);
        // A failure to print is the reader's wish to stop.
        std::io::stdout().flush().map_err(|e| peregrine::Error::Io(e.to_string()))?;
    }
    eprintln!("\n{:?} on {}, {:?}", answer.stop_reason(), engine.device_name(), answer.stats());
    Ok(())
}
