//! Each op of a decode step and of a prompt, as it runs in the model, beside its own floor.
//!
//! The launches are those of the model's own forward pass, with an event in front of each and one behind (`gpu::spans`). They
//! are queued behind reads that keep the GPU busy, so that the host's pace is not measured. A step is one persistent kernel where it
//! fits; to see inside, the same step is measured with one kernel an op too.

use std::fmt::Write;
use std::sync::Arc;

use super::machine::Ceilings;
use super::stats;
use super::work::Work;
use crate::config::ModelConfig;
use crate::cuda::{CudaModel, CudaTimeline};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gpu::ops::{self, Int4Matrix};
use crate::gpu::{DevBuf, Gpu, Stream, spans};
use crate::layout::{HEAD_DIM, UNIT_INPUTS, UNIT_ROWS};
use crate::sampler::Sampling;
use crate::scratch::PARTIAL_TOKENS;

/// Tokens in front of the step that is taken apart.
const CONTEXT: usize = 128;
/// Tokens of the prompt that is taken apart.
const PROMPT: usize = 512;
/// Times each is run; the median of each launch counts.
const RUNS: usize = 7;
/// Reads in front, each about a millisecond: longer than the host takes to queue a pass with its events.
const READS: usize = 4;
/// The pass that shows what two events and a launch cost by themselves.
const NOTHING: &str = "a launch that does nothing";

/// An op of a pass.
#[derive(Debug, Clone, PartialEq)]
pub struct OpTime {
    /// The pass: `step by one kernel an op`.
    pub pass: String,
    /// The op, and for products which one.
    pub op: String,
    /// Launches in the pass.
    pub launches: usize,
    /// Microseconds of all of them.
    pub us: f64,
    /// What all of them must move and do.
    pub work: Work,
    /// Microseconds that takes at the ceilings.
    pub floor_us: f64,
}

/// Takes a step and a prompt of the model apart. Loads it once more, for its launches.
///
/// # Errors
/// As [`CudaModel::load`]; [`Error::Usage`] if the model has too few positions.
pub fn measure(engine: &Engine, gpu: &Gpu, stream: &Stream, ceilings: Ceilings) -> Result<Vec<OpTime>> {
    let config = engine.config();
    let (context, prompt) = (CONTEXT.min(config.max_positions / 2), PROMPT.min(config.max_positions));
    let busy = Busy::new(gpu, stream)?;
    let mut sum = DevBuf::<f32>::zeros(stream, "sum", 1)?;
    let nothing = busy.record(|| ops::mma_peak(stream, &mut sum, 1, 1))?;
    let model = Arc::new(CudaModel::load(engine.checkpoint(), gpu.ordinal(), None)?);
    let head_bytes = model.head_bytes() as f64;
    let tokens = |m: usize, context: usize| Tokens { m, context, sliced: m <= PARTIAL_TOKENS, head_bytes };
    let (one, many) = (tokens(1, context), tokens(prompt, 0));
    let mut ops = Vec::new();
    if model.why_not_persistent().is_none() {
        let launches = step(&model, &busy, context)?;
        ops.extend(gathered("step by the persistent kernel", &launches, config, one, ceilings));
    }
    let Ok(model) = Arc::try_unwrap(model) else {
        return Err(Error::Usage("breakdown: the model is still in use".into()));
    };
    let model = Arc::new(model.without_persistent());
    let launches = step(&model, &busy, context)?;
    ops.extend(gathered("step by one kernel an op", &launches, config, one, ceilings));
    let launches = prefill(&model, &busy, prompt)?;
    ops.extend(gathered(&format!("prompt of {prompt}"), &launches, config, many, ceilings));
    ops.extend(gathered(NOTHING, &nothing, config, one, ceilings));
    Ok(ops)
}

/// Keeps the GPU busy while a pass is queued.
struct Busy<'a> {
    stream: &'a Stream,
    data: DevBuf<u8>,
    blocks: usize,
}

impl<'a> Busy<'a> {
    fn new(gpu: &Gpu, stream: &'a Stream) -> Result<Busy<'a>> {
        Ok(Busy {
            stream,
            data: DevBuf::zeros(stream, "data to read", 4 << 30)?,
            blocks: gpu.multiprocessors()? * 8,
        })
    }

    fn hold(&self) -> Result<()> {
        let mut mix = DevBuf::<u32>::zeros(self.stream, "mix", 1)?;
        (0..READS).try_for_each(|_| ops::stream_read(self.stream, &self.data, &mut mix, self.blocks))
    }

    /// The launches of `pass`, each with its median microseconds.
    fn record(&self, mut pass: impl FnMut() -> Result<()>) -> Result<Vec<(&'static str, f64)>> {
        let mut runs: Vec<Vec<(&'static str, f64)>> = Vec::new();
        for _ in 0..RUNS {
            self.hold()?;
            spans::record();
            let done = pass();
            let run = spans::take()?;
            done?;
            runs.push(run);
        }
        let first = runs.first().cloned().unwrap_or_default();
        let median = |i: usize| {
            stats::median(
                &runs.iter().filter_map(|run| run.get(i).map(|launch| launch.1)).collect::<Vec<_>>(),
            )
        };
        Ok(first.iter().enumerate().map(|(i, &(op, _))| (op, median(i))).collect())
    }
}

/// A step of one token after `context`, and the choice of a token.
fn step(model: &Arc<CudaModel>, busy: &Busy<'_>, context: usize) -> Result<Vec<(&'static str, f64)>> {
    let mut timeline = CudaTimeline::new(Arc::clone(model), context * 2)?;
    let ids: Vec<u32> = (0..context as u32).map(|i| i % 100).collect();
    timeline.prefill(&ids)?;
    let mut launches = busy.record(|| {
        timeline.rewind(context)?;
        timeline.logits(&[7], true, &mut |_| Ok(()))
    })?;
    // The first token of a generation is chosen by a launch of its own; those behind it are in a graph.
    launches.extend(busy.record(|| {
        let recorded = spans::take();
        timeline.rewind(0)?;
        timeline.prefill(&ids)?;
        timeline.begin(&Sampling::greedy().ignore_eos(true), &[], &ids)?;
        recorded?;
        spans::record();
        timeline.next_token().map(|_| ())
    })?);
    Ok(launches)
}

fn prefill(model: &Arc<CudaModel>, busy: &Busy<'_>, prompt: usize) -> Result<Vec<(&'static str, f64)>> {
    let mut timeline = CudaTimeline::new(Arc::clone(model), prompt)?;
    let ids: Vec<u32> = (0..prompt as u32).map(|i| i % 100).collect();
    busy.record(|| {
        timeline.rewind(0)?;
        timeline.prefill(&ids)
    })
}

/// The tokens of a pass.
#[derive(Clone, Copy)]
struct Tokens {
    m: usize,
    context: usize,
    /// A layer's last product leaves its K slices to the norm.
    sliced: bool,
    /// Of the head's table.
    head_bytes: f64,
}

/// The launches of a pass, summed by op, in the order in which they come first.
fn gathered(
    pass: &str,
    launches: &[(&'static str, f64)],
    config: &ModelConfig,
    tokens: Tokens,
    ceilings: Ceilings,
) -> Vec<OpTime> {
    let Tokens { m, context, sliced, head_bytes } = tokens;
    let mut ops: Vec<OpTime> = Vec::new();
    let (mut products, mut norms) = (0, 0);
    for &(op, us) in launches {
        let (name, work) = match op {
            "gptq_gemv" | "gptq_batch" | "gptq_gemm" => {
                products += 1;
                match products % 2 {
                    1 => (format!("{op} [qkv ; up]"), up_product(config, m)),
                    _ => (format!("{op} [down | dense]"), down_product(config, m, sliced)),
                }
            }
            "layernorm" => {
                norms += 1;
                (op.to_owned(), layernorm(config, m, norms > 1 && sliced))
            }
            other => (other.to_owned(), other_work(config, other, m, context, head_bytes)),
        };
        let floor_us = work.floor_seconds(ceilings.bytes_per_second, ceilings.flop_per_second) * 1e6;
        match ops.iter_mut().find(|known| known.op == name) {
            Some(known) => {
                known.launches += 1;
                known.us += us;
                known.floor_us += floor_us;
                known.work = Work { bytes: known.work.bytes + work.bytes, flop: known.work.flop + work.flop };
            }
            None => ops.push(OpTime { pass: pass.to_owned(), op: name, launches: 1, us, work, floor_us }),
        }
    }
    ops
}

/// The product `[qkv ; up]`.
#[must_use]
pub fn up_product(config: &ModelConfig, m: usize) -> Work {
    let n = config.qkv_size() + config.ffn_size;
    product(n, config.hidden_size, m, m * n * 2)
}

/// The product `[down | dense]`: added to the residual, or K slices apart.
#[must_use]
pub fn down_product(config: &ModelConfig, m: usize, sliced: bool) -> Work {
    let (n, k) = (config.hidden_size, config.ffn_size + config.hidden_size);
    product(n, k, m, if sliced { ops::slices(k) * m * n * 4 } else { m * n * 8 })
}

fn product(n: usize, k: usize, m: usize, out_bytes: usize) -> Work {
    let units = n / UNIT_ROWS * (k / UNIT_INPUTS) * Int4Matrix::unit_bytes(1, false);
    Work { bytes: (units + m * k * 2 + out_bytes) as f64, flop: 2.0 * (m * n * k) as f64 }
}

/// A norm, which adds the slices of the product in front of it, or has none to add.
#[must_use]
pub fn layernorm(config: &ModelConfig, m: usize, adds: bool) -> Work {
    let slices = ops::slices(config.ffn_size + config.hidden_size);
    let value = 4 + 2 + if adds { 4 + 4 * slices } else { 0 };
    Work { bytes: (m * config.hidden_size * value) as f64, flop: (8 * m * config.hidden_size) as f64 }
}

/// Any other op. `head_bytes`: those of the head's table.
#[must_use]
pub fn other_work(config: &ModelConfig, op: &str, m: usize, context: usize, head_bytes: f64) -> Work {
    let (hidden, heads, vocab) = (config.hidden_size, config.num_heads, config.vocab_size);
    let table = (vocab * hidden) as f64;
    let qkv = (m * config.qkv_size() * 2) as f64;
    let seen: f64 = (0..m).map(|t| (context + t + 1) as f64).sum();
    let attention = Work {
        bytes: ((context + m) * 4 * HEAD_DIM) as f64 + qkv + (m * hidden * 2) as f64,
        flop: seen * (4 * heads * HEAD_DIM) as f64,
    };
    match op {
        "embed" => Work { bytes: (m * hidden * 6) as f64, flop: 0.0 },
        "rope" => Work { bytes: 2.0 * qkv, flop: (6 * m * heads * HEAD_DIM) as f64 },
        "attn_decode" | "attn_prefill" => attention,
        // A prompt's head is of its last token.
        "head" => Work { bytes: head_bytes + (vocab * 4) as f64, flop: 2.0 * table },
        "sample" => Work { bytes: (vocab * 4) as f64, flop: 0.0 },
        "decode_step" => {
            let (up, down) = (up_product(config, m), down_product(config, m, true));
            let layers = config.num_layers as f64;
            Work {
                bytes: layers * (up.bytes + down.bytes + ((context + m) * 4 * HEAD_DIM) as f64) + head_bytes,
                flop: layers * (up.flop + down.flop + attention.flop) + 2.0 * m as f64 * table,
            }
        }
        _ => Work::default(),
    }
}

/// The passes as tables, each with a picture of `columns` characters in which width is time.
#[must_use]
pub fn table(ops: &[OpTime], columns: usize) -> String {
    let mut text = String::new();
    for pass in passes(ops) {
        let total: f64 = pass.iter().map(|op| op.us).sum();
        if pass.first().is_some_and(|op| op.pass == NOTHING) {
            let _ = writeln!(
                text,
                "\n{NOTHING} takes {total:.1} us between its events. Without events neighbours overlap: a step of many launches takes \
                 less than their sum."
            );
            continue;
        }
        let floor: f64 = pass.iter().map(|op| op.floor_us).sum();
        let name = pass.first().map_or("", |op| op.pass.as_str());
        let _ = writeln!(
            text,
            "\n{name}: {total:.1} us in its launches, floor {floor:.1} us, {:.0} % of it\n",
            floor / total * 100.0
        );
        let _ = writeln!(
            text,
            "{:<28} {:>8} {:>10} {:>9} {:>7} {:>10} {:>9} {:>8} {:>9}",
            "op", "launches", "us", "us each", "time", "floor us", "of floor", "GB/s", "TFLOP/s"
        );
        for op in pass {
            let _ = writeln!(
                text,
                "{:<28} {:>8} {:>10.1} {:>9.2} {:>5.1} % {:>10.1} {:>7.0} % {:>8.0} {:>9.1}",
                op.op,
                op.launches,
                op.us,
                op.us / op.launches as f64,
                op.us / total * 100.0,
                op.floor_us,
                op.floor_us / op.us * 100.0,
                op.work.bytes / op.us / 1e3,
                op.work.flop / op.us / 1e6
            );
        }
        let _ = writeln!(text, "\n{}", flame(pass, columns));
    }
    text
}

/// The ops of each pass.
pub(super) fn passes(ops: &[OpTime]) -> impl Iterator<Item = &[OpTime]> {
    ops.chunk_by(|a, b| a.pass == b.pass)
}

/// Two bars: the whole pass, and its ops in their order, as wide as they take long; `#` is what the floor takes of each.
fn flame(pass: &[OpTime], columns: usize) -> String {
    let total: f64 = pass.iter().map(|op| op.us).sum();
    let whole = format!("|{:-^1$}|", format!(" {:.1} us ", total), columns.saturating_sub(2));
    let (mut names, mut bars) = (String::new(), String::new());
    let mut end = 0.0;
    let mut drawn = 0;
    for op in pass {
        end += op.us / total * columns as f64;
        let width = (end.round() as usize).saturating_sub(drawn);
        drawn += width;
        if width == 0 {
            continue;
        }
        let room = width - 1;
        let name: String = op.op.chars().take(room).collect();
        let _ = write!(names, "|{name:<room$}");
        let filled = ((op.floor_us / op.us).min(1.0) * room as f64).round() as usize;
        let _ = write!(bars, "|{}{}", "#".repeat(filled), ".".repeat(room - filled));
    }
    format!("{whole}\n{names}|\n{bars}|\n# its floor   . what is beyond")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_gathered_by_op_and_drawn_to_scale() {
        let ops: Vec<OpTime> = [("a", 30.0, 15.0), ("b", 10.0, 10.0)]
            .into_iter()
            .map(|(op, us, floor_us)| OpTime {
                pass: "step".into(),
                op: op.into(),
                launches: 1,
                us,
                work: Work { bytes: 1e6, flop: 0.0 },
                floor_us,
            })
            .collect();
        let text = table(&ops, 40);
        assert!(text.contains("step: 40.0 us"), "{text}");
        let bars = text.lines().find(|line| line.contains('#')).unwrap();
        assert_eq!(bars, format!("|{}{}|{}|", "#".repeat(15), ".".repeat(14), "#".repeat(9)), "{text}");
    }
}
