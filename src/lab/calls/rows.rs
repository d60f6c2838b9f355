//! Calls of ops on rows and on the table: layernorm, permute, embed, head.

use std::rc::Rc;

use super::super::kit::{self, NAN16, Random, to_f32};
use super::super::{FFN, HIDDEN, VOCAB};
use super::{Call, F16_TOLERANCE, F32_TOLERANCE, Output, all, guarded, only, trespass};
use crate::checkpoint::{FloatTensor, FloatType};
use crate::error::Result;
use crate::gpu::ops::{self, Norm, PendingSum, StepTokens, Table};
use crate::gpu::{DevBuf, Stream};
use crate::measure::work::Work;
use crate::{planes, reference};

/// More for 16 inputs of head's sums of more than 8 tokens, of which a row is one chain of Hopper's tensor core: its f32 adds truncate, by
/// 2/3 * 2^-24 of the result at most, as gptq_batch's. Measured, with what is F32_TOLERANCE's: 4.1e-7 over 320 inputs, 5.2e-6 over 4544.
const CHAIN_TOLERANCE: f64 = 2.0 / 3.0 / (1 << 24) as f64;

/// The calls of an op on rows.
pub(super) fn calls(op: &str, stream: &Stream, timing: bool, calls: &mut Vec<Box<dyn Call>>) -> Result<()> {
    match op {
        "layernorm" => {
            let checks: &[_] = &[
                (64, 1, 0),
                (64, 65, 2),
                (320, 3, 5),
                (HIDDEN, 1, 0),
                (HIDDEN, 1, 5),
                (HIDDEN, 8, 5),
                (HIDDEN, 63, 0),
                (HIDDEN, 65, 3),
                (8192, 5, 1),
            ];
            // Up to 72 tokens the product in front leaves its slices to the norm.
            let times: &[_] = &[
                (HIDDEN, 1, 5),
                (HIDDEN, 8, 5),
                (HIDDEN, 64, 5),
                (HIDDEN, 512, 5),
                (HIDDEN, 512, 0),
                (HIDDEN, 2048, 0),
            ];
            for &(hidden, m, slices) in if timing { times } else { checks } {
                calls.push(Box::new(LayernormCall::new(stream, hidden, m, slices, false)?));
            }
        }
        "permute" => {
            let checks: &[_] =
                &[(64, 1), (320, 3), (HIDDEN, 65), (HIDDEN, 301), (FFN + HIDDEN, 9), (FFN + HIDDEN, 265)];
            let times: &[_] = &[
                (HIDDEN, 1),
                (FFN + HIDDEN, 1),
                (HIDDEN, 128),
                (FFN + HIDDEN, 128),
                (HIDDEN, 2048),
                (FFN + HIDDEN, 2048),
            ];
            for &(n, m) in if timing { times } else { checks } {
                calls.push(Box::new(PermuteCall::new(stream, n, m)?));
            }
        }
        "embed" => {
            for m in if timing { vec![1, 512] } else { vec![1, 63, 65] } {
                let packed = timing || m == 63;
                calls.push(Box::new(EmbedCall::new(stream, if timing { VOCAB } else { 1024 }, m, packed)?));
            }
        }
        _ => {
            let sizes = |packed| [1, 8, 16, 63, 64].map(|m| (4096, HIDDEN, m, packed));
            let checks: &[_] = &[
                &[(16, 64, 1, false), (512, 320, 9, false), (512, 320, 9, true)],
                &sizes(false)[..],
                &sizes(true),
            ]
            .concat();
            let times: &[_] = &[(1, false), (1, true), (8, true), (16, true), (32, true), (64, true)]
                .map(|(m, packed)| (VOCAB, HIDDEN, m, packed));
            // Neighbours of one shape share a table: Falcon-7B's has 600 MB.
            let mut shared: Option<Rc<(Vec<u8>, Table)>> = None;
            for &(vocab, hidden, m, packed) in if timing { times } else { checks } {
                let fits =
                    shared.take().filter(|t| (t.1.vocab, t.1.hidden, t.1.packed) == (vocab, hidden, packed));
                let table = match fits {
                    Some(table) => table,
                    None => {
                        let table = kit::table(stream, vocab, hidden, packed)?;
                        table.1.lay_near(stream)?;
                        Rc::new(table)
                    }
                };
                calls.push(Box::new(HeadCall::new(stream, Rc::clone(&table), m)?));
                shared = Some(table);
            }
        }
    }
    Ok(())
}

/// Those of `layernorm` that writes planes, where the GPU takes them.
pub(super) fn planes_calls(stream: &Stream, timing: bool, calls: &mut Vec<Box<dyn Call>>) -> Result<()> {
    let quantised = kit::Quantised::new(&mut Random::new(1), 64, 64, kit::G64);
    if !ops::gptq_batch_planes(stream, &kit::repack(stream, 64, 64, &[(&quantised, 0, 0)])?)? {
        return Ok(());
    }
    let checks: &[_] = &[(64, 9, 0), (320, 16, 3), (HIDDEN, 9, 0), (HIDDEN, 16, 5)];
    for &(hidden, m, slices) in if timing { &[(HIDDEN, 16, 5)] } else { checks } {
        calls.push(Box::new(LayernormCall::new(stream, hidden, m, slices, true)?));
    }
    Ok(())
}

/// Rounding to planes: to steps of the largest of 64 / 32639. Measured: 3.5e-5.
const PLANES_TOLERANCE: f64 = 5e-5;

struct LayernormCall {
    hidden: usize,
    m: usize,
    slices: usize,
    planes: bool,
    norm: Norm,
    host: [Vec<f32>; 5],
    x: DevBuf<f32>,
    partials: DevBuf<f32>,
    sum_bias: DevBuf<f32>,
    out: DevBuf<u16>,
}

impl LayernormCall {
    fn new(stream: &Stream, hidden: usize, m: usize, slices: usize, planes: bool) -> Result<LayernormCall> {
        let mut random = Random::new((hidden * 31 + m * 7 + slices) as u64);
        let (weight, bias) = (random.values(hidden, 1.0), random.values(hidden, 0.5));
        let (x, partials) = (random.values(m * hidden, 3.0), random.values(slices * m * hidden, 1.0));
        let sum_bias = random.values(hidden, 1.0);
        let out = if planes { planes::len(hidden) } else { m * hidden };
        Ok(LayernormCall {
            hidden,
            m,
            slices,
            planes,
            norm: Norm {
                weight: guarded(stream, "weight", &weight)?,
                bias: guarded(stream, "bias", &bias)?,
                epsilon: 1e-5,
            },
            x: guarded(stream, "x", &x)?,
            partials: guarded(stream, "partials", &partials)?,
            sum_bias: guarded(stream, "partials_bias", &sum_bias)?,
            out: guarded(stream, "out", &vec![u16::MAX; out])?,
            host: [weight, bias, x, partials, sum_bias],
        })
    }
}

impl Call for LayernormCall {
    fn label(&self) -> String {
        let planes = if self.planes { ", planes" } else { "" };
        format!("layernorm [{}, {}], {} slices{planes}", self.m, self.hidden, self.slices)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.x.upload(stream, 0, &self.host[2])?;
        // No number, and no step of planes either.
        self.out.upload(stream, 0, &vec![u16::MAX; self.out.len()])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let sum = PendingSum { partials: &self.partials, slices: self.slices, bias: Some(&self.sum_bias) };
        let pending = (self.slices > 0).then_some(sum);
        ops::layernorm(stream, &self.norm, &mut self.x, pending, self.m, &mut self.out, self.planes)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let [weight, bias, x, partials, sum_bias] = &self.host;
        let mut x = x.clone();
        for part in partials.chunks(self.m * self.hidden) {
            reference::add(&mut x, part);
        }
        if self.slices > 0 {
            x.chunks_mut(self.hidden).for_each(|row| reference::add(row, sum_bias));
        }
        let want = only(wanted, || reference::layernorm(&x, weight, bias, 1e-5));
        let (new_x, out) = (all(stream, &self.x)?, all(stream, &self.out)?);
        let (out, tolerance) = if self.planes {
            (planes::decode(&out, self.hidden, self.m), PLANES_TOLERANCE)
        } else {
            (to_f32(&out), F16_TOLERANCE)
        };
        Ok(vec![
            Output { name: "x", row: self.hidden, got: new_x, want: x, tolerance: 0.0 },
            Output { name: "out", row: self.hidden, got: out, want, tolerance },
        ])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "out": self.out, "x": self.x, "partials": self.partials, "weight": self.norm.weight,
            "bias": self.norm.bias, "partials_bias": self.sum_bias)
    }

    fn work(&self) -> Work {
        let value = 4 + 2 + if self.slices > 0 { 4 + 4 * self.slices } else { 0 };
        Work { bytes: (self.m * self.hidden * value) as f64, flop: (8 * self.m * self.hidden) as f64 }
    }
}

struct PermuteCall {
    n: usize,
    m: usize,
    want: Vec<u16>,
    x: DevBuf<u16>,
    source: DevBuf<u32>,
    out: DevBuf<u16>,
}

impl PermuteCall {
    fn new(stream: &Stream, n: usize, m: usize) -> Result<PermuteCall> {
        let mut random = Random::new(n as u64);
        let x = random.halves(m * n, 1.0);
        let source: Vec<u32> = (0..n).map(|_| (random.bits() % n as u64) as u32).collect();
        let want = x.chunks(n).flat_map(|row| source.iter().map(|&i| row[i as usize]).collect::<Vec<_>>());
        Ok(PermuteCall {
            n,
            m,
            want: want.collect(),
            x: guarded(stream, "x", &x)?,
            source: guarded(stream, "source", &source)?,
            out: guarded(stream, "out", &vec![NAN16; m * n])?,
        })
    }
}

impl Call for PermuteCall {
    fn label(&self) -> String {
        format!("permute [{}, {}]", self.m, self.n)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.out.upload(stream, 0, &vec![NAN16; self.m * self.n])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        ops::permute(stream, &self.x, &self.source, self.m, &mut self.out)
    }

    fn outputs(&self, stream: &Stream, _wanted: bool) -> Result<Vec<Output>> {
        let got = to_f32(&all(stream, &self.out)?);
        Ok(vec![Output { name: "out", row: self.n, got, want: to_f32(&self.want), tolerance: 0.0 }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "out": self.out, "x": self.x, "source": self.source)
    }

    fn work(&self) -> Work {
        Work { bytes: (self.n * (4 * self.m + 4)) as f64, flop: 0.0 }
    }
}

fn format_name(table: &Table) -> &'static str {
    if table.packed { ", packed" } else { "" }
}

struct EmbedCall {
    m: usize,
    ids: Vec<u32>,
    bytes: Vec<u8>,
    table: Table,
    words: DevBuf<u32>,
    x: DevBuf<f32>,
}

impl EmbedCall {
    fn new(stream: &Stream, vocab: usize, m: usize, packed: bool) -> Result<EmbedCall> {
        let (bytes, table) = kit::table(stream, vocab, HIDDEN, packed)?;
        let mut random = Random::new(m as u64);
        let mut ids: Vec<u32> = (0..m).map(|_| (random.bits() % vocab as u64) as u32).collect();
        ids[m - 1] = vocab as u32 - 1;
        let words = guarded(stream, "token", &ops::step_token_words(&ids, 0, 0)?)?;
        Ok(EmbedCall { m, ids, bytes, table, words, x: guarded(stream, "x", &vec![f32::NAN; m * HIDDEN])? })
    }
}

impl Call for EmbedCall {
    fn label(&self) -> String {
        format!("embed [{}, {HIDDEN}] of {}{}", self.m, self.table.vocab, format_name(&self.table))
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.x.upload(stream, 0, &vec![f32::NAN; self.m * HIDDEN])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        ops::embed(stream, &self.table, StepTokens::list(&self.words, self.m), &mut self.x)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let tensor =
            FloatTensor { dtype: FloatType::F16, shape: [self.table.vocab, HIDDEN], bytes: &self.bytes };
        let want = only(wanted, || reference::embed(&tensor, &self.ids));
        Ok(vec![Output { name: "x", row: HIDDEN, got: all(stream, &self.x)?, want, tolerance: 0.0 }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "x": self.x, "token": self.words, "units": self.table.units)
    }

    fn work(&self) -> Work {
        Work { bytes: (self.m * HIDDEN * 6) as f64, flop: 0.0 }
    }
}

struct HeadCall {
    m: usize,
    host_x: Vec<u16>,
    /// On the host as the checkpoint has it, and on the GPU.
    table: Rc<(Vec<u8>, Table)>,
    x: DevBuf<u16>,
    logits: DevBuf<f32>,
}

impl HeadCall {
    fn new(stream: &Stream, table: Rc<(Vec<u8>, Table)>, m: usize) -> Result<HeadCall> {
        let Table { vocab, hidden, .. } = table.1;
        let host_x = Random::new(10 + m as u64).halves(m * hidden, 1.0);
        let x = guarded(stream, "x", &host_x)?;
        Ok(HeadCall { m, host_x, table, x, logits: guarded(stream, "logits", &vec![f32::NAN; m * vocab])? })
    }
}

impl Call for HeadCall {
    fn label(&self) -> String {
        let table = &self.table.1;
        format!("head [{}, {}] of {}{}", self.m, table.hidden, table.vocab, format_name(table))
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.logits.upload(stream, 0, &vec![f32::NAN; self.m * self.table.1.vocab])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        ops::head(stream, &self.table.1, &self.x, 0, self.m, &mut self.logits, 0)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let Table { vocab, hidden, .. } = self.table.1;
        let tensor = FloatTensor { dtype: FloatType::F16, shape: [vocab, hidden], bytes: &self.table.0 };
        let want = only(wanted, || reference::head(&to_f32(&self.host_x), &tensor));
        let got = all(stream, &self.logits)?;
        let chain = if self.m > ops::GEMV_TOKENS { hidden / 16 } else { 0 };
        let tolerance = F32_TOLERANCE + chain as f64 * CHAIN_TOLERANCE;
        Ok(vec![Output { name: "logits", row: vocab, got, want, tolerance }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "logits": self.logits, "x": self.x, "units": self.table.1.units)
    }

    fn work(&self) -> Work {
        let weights = (self.table.1.vocab * self.table.1.hidden) as f64;
        let moved = self.m * (self.table.1.hidden * 2 + self.table.1.vocab * 4);
        Work { bytes: self.table.1.units.bytes() as f64 + moved as f64, flop: 2.0 * weights * self.m as f64 }
    }
}
