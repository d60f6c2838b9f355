//! The five most likely next tokens after each token of a text:
//! `cargo run --example logits -- MODEL "Once upon a time"`.

use peregrine::engine::{Engine, LoadOptions, SessionOptions};
use peregrine::sampler::{self, Sampling};

fn main() -> peregrine::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().unwrap_or_else(|| "models/tiny-falcon-tales".to_owned());
    let text = arguments.next().unwrap_or_else(|| "Once upon a time".to_owned());

    let engine = Engine::load(&model, &LoadOptions::default())?;
    let tokenizer = engine.tokenizer()?;
    let ids = tokenizer.encode(&text, false)?;
    let mut seen = ids.iter();
    let five = Sampling::greedy().temperature(1.0).top_k(5);
    engine.session(SessionOptions::default())?.logits(&ids, false, &mut |logits| {
        let after = seen.next().map(|&id| tokenizer.decode(&[id], false)).unwrap_or_default();
        let likely = sampler::kept(logits, &five);
        let likely = likely.iter().map(|(id, _)| (tokenizer.decode(&[*id], false), logits[*id as usize]));
        println!("{after:>12?} -> {:?}", likely.collect::<Vec<_>>());
        Ok(())
    })
}
