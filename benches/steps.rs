//! Decode steps of 1 to 64 texts together, on a checkpoint: `cargo bench --bench steps DIR [CONTEXT [sustained]]`.
//!
//! Each text has a random prompt of CONTEXT tokens (128 unless given); then greedy steps, sampling included, as a caller sees them: from the
//! return of one `next_step` to that of the next. Median of the steps, with the 10th and 90th percentile; and `mean`, what a
//! token of the whole answer takes, from the first one's choice, which comes of the prompt and takes no step, to the last. Bytes are those of
//! the weights, each read once a step; prompts are not timed.
//!
//! A GPU that has worked for half a second may have reached its power limit, and from then on its clock depends on what it did before: the
//! same step takes up to 10 % longer. So each number of texts begins with a GPU that has rested, as the first one does: before the
//! prompts, and again behind them: those of 64 texts are 64 times the work of one text's, and would leave it less rested.
//! `sustained` asks for what comes after that instead: the answers are given again and again for some seconds, and the last ones are timed.
#![allow(clippy::unwrap_used, missing_docs)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use peregrine::Error;
use peregrine::engine::{Batch, Device, Engine, LoadOptions, SessionOptions};
use peregrine::sampler::Sampling;

const STEPS: usize = 120;
/// Steps not timed: the first are queued ahead.
const WARM_UP: usize = 10;
/// Before each number of texts' prompts, and before its steps.
const REST: Duration = Duration::from_secs(2);
/// What `sustained` waits for.
const SUSTAINED: Duration = Duration::from_secs(4);
const SLOTS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// The checkpoint, the context, and whether what is sustained is asked for.
fn asked() -> Option<(String, usize, bool)> {
    let mut words = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let model = words.next()?;
    let context = words.next().unwrap_or("128".into());
    let context = context.parse().unwrap_or_else(|_| wrong(&context, "a number of tokens"));
    let sustained =
        words.next().is_some_and(|word| word == "sustained" || wrong(&word, "`sustained` or nothing"));
    Some((model, context, sustained))
}

fn wrong(got: &str, wanted: &str) -> ! {
    eprintln!("steps: got '{got}', wanted {wanted}: cargo bench --bench steps DIR [CONTEXT [sustained]]");
    std::process::exit(2)
}

/// Milliseconds of each step of an answer from rest, or of the last of the answers that fill [`SUSTAINED`].
fn timed(batch: &mut Batch, prompts: &[&[u32]], sampling: &Sampling, sustained: bool) -> Vec<f64> {
    sleep(REST);
    let began = Instant::now();
    let mut ms = Vec::new();
    while ms.is_empty() || sustained && began.elapsed() < SUSTAINED {
        batch.begin(prompts, sampling).unwrap();
        if !sustained {
            sleep(REST);
        }
        ms.clear();
        let mut last = Instant::now();
        for _ in 0..STEPS {
            assert!(batch.next_step().unwrap().iter().all(Option::is_some));
            ms.push(last.elapsed().as_secs_f64() * 1e3);
            last = Instant::now();
        }
    }
    ms
}

fn main() {
    let Some((model, context, sustained)) = asked() else {
        eprintln!("SKIPPED steps: name a checkpoint: cargo bench --bench steps DIR [CONTEXT [sustained]]");
        return;
    };
    let options = LoadOptions { device: Device::Cuda(0), ..LoadOptions::default() };
    let engine = match Engine::load(&model, &options) {
        Ok(engine) => engine,
        Err(error @ Error::NoGpu(_)) => return eprintln!("SKIPPED steps: {error}"),
        Err(error) => {
            eprintln!("steps: {error}");
            std::process::exit(error.exit_code().into())
        }
    };
    let most = engine.config().max_positions.saturating_sub(STEPS);
    if context == 0 || context > most {
        wrong(&context.to_string(), &format!("1 to {most} tokens, for {STEPS} steps behind them"));
    }
    let weights = engine.memory().step_weight_bytes as f64;
    let vocab = engine.config().vocab_size as u64;
    let from = if sustained { "sustained" } else { "from rest" };
    println!("{}, context {context}, {:.2} GB of weights, {from}", engine.device_name(), weights / 1e9);
    println!(
        "{:>5} {:>9} {:>19} {:>10} {:>7} {:>9} {:>9} {:>9}",
        "texts", "ms/step", "10 % .. 90 %", "tokens/s", "TB/s", "x 1 text", "mean ms", "x 1 text"
    );
    let (mut one, mut one_mean) = (0.0, 0.0);
    for slots in SLOTS {
        let mut batch = engine.batch(slots, SessionOptions::default()).unwrap();
        let id = |i: u64| ((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) % vocab;
        let prompts: Vec<Vec<u32>> =
            (0..slots).map(|s| (0..context).map(|i| id((s * context + i) as u64) as u32).collect()).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let sampling = Sampling::greedy().max_new_tokens(STEPS).ignore_eos(true);
        let mut ms = timed(&mut batch, &prompts, &sampling, sustained);
        let mean = ms.iter().sum::<f64>() / ms.len() as f64;
        ms.drain(..WARM_UP);
        ms.sort_by(f64::total_cmp);
        let [low, median, high] = [1, 5, 9].map(|tenth| ms[ms.len() * tenth / 10]);
        if slots == 1 {
            (one, one_mean) = (median, mean);
        }
        let (rate, tb) = (slots as f64 / median * 1e3, weights / median / 1e9);
        println!(
            "{slots:>5} {median:>9.3} {low:>8.3} .. {high:>7.3} {rate:>10.0} {tb:>7.2} {:>9.3} {mean:>9.3} {:>9.3}",
            median / one,
            mean / one_mean
        );
    }
}
