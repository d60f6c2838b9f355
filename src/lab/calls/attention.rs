//! Calls of rope and attention.

use super::super::kit::{self, NAN16, Random, to_f32};
use super::super::{CONTEXT, HEADS, THETA};
use super::{Call, F16_TOLERANCE, Output, all, guarded, only, trespass};
use crate::error::{Error, Result};
use crate::gpu::ops::{self, AttnOutput, AttnScratch, LayerCache, StepTokens};
use crate::gpu::{DevBuf, Stream};
use crate::layout::{HEAD_DIM, f32_to_f16};
use crate::measure::work::Work;
use crate::reference;

/// The calls of rope or attention.
pub(super) fn calls(op: &str, stream: &Stream, timing: bool, calls: &mut Vec<Box<dyn Call>>) -> Result<()> {
    match op {
        "rope" => {
            let checks: &[_] = &[(5, 1, 0), (HEADS, 1, CONTEXT - 1), (HEADS, 65, 1000), (5, 300, 7)];
            for &(heads, m, at) in if timing { &[(HEADS, 512, 0)] } else { checks } {
                calls.push(Box::new(RopeCall::new(stream, heads, m, at)?));
            }
        }
        "attn_decode" => {
            let checks: &[_] = &[
                (5, 1, 0),
                (5, 1, 63),
                (5, 1, 64),
                (HEADS, 1, 65),
                (HEADS, 1, 127),
                (HEADS, 1, 128),
                (HEADS, 8, 1000),
                (HEADS, 1, CONTEXT - 1),
            ];
            let times: &[_] = &[(1, 128), (1, 1024), (1, CONTEXT - 1), (8, 1024), (8, CONTEXT - 8)]
                .map(|(m, at)| (HEADS, m, at));
            for &(heads, m, at) in if timing { times } else { checks } {
                calls.push(Box::new(AttentionCall::new(stream, true, heads, m, at)?));
            }
        }
        _ => {
            let checks: &[_] = &[
                (5, 1, 0),
                (HEADS, 63, 0),
                (HEADS, 64, 0),
                (HEADS, 65, 0),
                (5, 65, 100),
                (5, 17, CONTEXT - 17),
            ];
            let times: &[_] = &[64, 128, 512, 2048].map(|m| (HEADS, m, 0));
            for &(heads, m, at) in if timing { times } else { checks } {
                calls.push(Box::new(AttentionCall::new(stream, false, heads, m, at)?));
            }
        }
    }
    Ok(())
}

/// Queries, keys and weights are f16, the output is rounded to f16. Measured: 2.4e-4.
const ATTENTION_TOLERANCE: f64 = 4e-4;

/// The words of tokens of slot 0 from `at` on.
fn token_words(stream: &Stream, m: usize, at: usize) -> Result<DevBuf<u32>> {
    guarded(stream, "token", &ops::step_token_words(&vec![0; m], at, 0)?)
}

/// Heads `first ..` of each row of `x [.., heads + 2, 64]`.
fn part(x: &[f32], heads: usize, first: usize, count: usize) -> Vec<f32> {
    x.chunks((heads + 2) * HEAD_DIM)
        .flat_map(|row| row[first * HEAD_DIM..(first + count) * HEAD_DIM].to_vec())
        .collect()
}

fn rounded(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&v| f32_to_f16(v)).collect()
}

/// A cache of one sequence that begins with these rows; the rest is not a number.
fn cache(stream: &Stream, keys: &[u16], values: &[u16]) -> Result<LayerCache> {
    let full = |rows: &[u16]| {
        let mut full = rows.to_vec();
        full.resize(CONTEXT * HEAD_DIM, NAN16);
        full
    };
    Ok(LayerCache {
        k: guarded(stream, "k_cache", &full(keys))?,
        v: guarded(stream, "v_cache", &full(values))?,
        slots: 1,
        max_context: CONTEXT,
    })
}

struct RopeCall {
    heads: usize,
    m: usize,
    at: usize,
    host: Vec<u16>,
    qkv: DevBuf<u16>,
    cache: LayerCache,
    table: DevBuf<f32>,
    words: DevBuf<u32>,
}

impl RopeCall {
    fn new(stream: &Stream, heads: usize, m: usize, at: usize) -> Result<RopeCall> {
        let host = Random::new((at + m) as u64).halves(m * (heads + 2) * HEAD_DIM, 1.0);
        Ok(RopeCall {
            heads,
            m,
            at,
            qkv: guarded(stream, "qkv", &host)?,
            host,
            cache: cache(stream, &[], &[])?,
            table: kit::rope_table(stream)?,
            words: token_words(stream, m, at)?,
        })
    }
}

impl Call for RopeCall {
    fn label(&self) -> String {
        format!("rope {} heads, {} tokens at {}", self.heads, self.m, self.at)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.qkv.upload(stream, 0, &self.host)?;
        let unset = vec![NAN16; CONTEXT * HEAD_DIM];
        self.cache.k.upload(stream, 0, &unset)?;
        self.cache.v.upload(stream, 0, &unset)
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let tokens = StepTokens::list(&self.words, self.m);
        ops::rope(stream, &mut self.qkv, self.heads, &mut self.cache, &self.table, tokens)
    }

    fn outputs(&self, stream: &Stream, _wanted: bool) -> Result<Vec<Output>> {
        let (heads, at) = (self.heads, self.at * HEAD_DIM);
        let mut want = to_f32(&self.host);
        let values = part(&want, heads, heads + 1, 1);
        reference::rope(&mut want, heads + 2, self.at, THETA);
        let got = to_f32(&all(stream, &self.qkv)?);
        let row =
            |buffer: &DevBuf<u16>| Ok::<_, Error>(to_f32(&buffer.download(stream, at, self.m * HEAD_DIM)?));
        let (key, value) = (row(&self.cache.k)?, row(&self.cache.v)?);
        Ok(vec![
            Output {
                name: "queries",
                row: heads * HEAD_DIM,
                got: part(&got, heads, 0, heads),
                want: part(&want, heads, 0, heads),
                tolerance: F16_TOLERANCE,
            },
            Output {
                name: "k_cache",
                row: HEAD_DIM,
                got: key,
                want: part(&want, heads, heads, 1),
                tolerance: F16_TOLERANCE,
            },
            Output { name: "v_cache", row: HEAD_DIM, got: value, want: values, tolerance: 0.0 },
        ])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "qkv": self.qkv, "k_cache": self.cache.k, "v_cache": self.cache.v, "table": self.table)
    }

    fn work(&self) -> Work {
        let values = self.m * (self.heads + 2) * HEAD_DIM;
        Work { bytes: (4 * values) as f64, flop: (6 * values) as f64 }
    }
}

struct AttentionCall {
    decode: bool,
    heads: usize,
    m: usize,
    at: usize,
    /// Not rotated, `[at + m, heads + 2, 64]`; for a prompt its own queries, and keys that are taken as they are.
    host: Vec<u16>,
    keys: Vec<u16>,
    values: Vec<u16>,
    qkv: DevBuf<u16>,
    cache: LayerCache,
    table: DevBuf<f32>,
    words: DevBuf<u32>,
    scratch: AttnScratch,
    out: DevBuf<u16>,
}

/// Values between two tokens of attention's output that are not its own.
const GAP: usize = 96;
/// Index of its first value.
const FIRST: usize = 32;

impl AttentionCall {
    fn new(stream: &Stream, decode: bool, heads: usize, m: usize, at: usize) -> Result<AttentionCall> {
        let (length, n) = (at + m, (heads + 2) * HEAD_DIM);
        let mut random = Random::new((heads * 10_000 + at * 7 + m) as u64);
        let host = random.halves(m * n, 1.3);
        let (mut keys, mut values) =
            (random.halves(length * HEAD_DIM, 1.3), random.halves(length * HEAD_DIM, 1.0));
        if decode {
            // The last of them are what the call appends.
            let mut rotated = to_f32(&host);
            let own = rounded(&part(&rotated, heads, heads + 1, 1));
            reference::rope(&mut rotated, heads + 2, at, THETA);
            keys[at * HEAD_DIM..].copy_from_slice(&rounded(&part(&rotated, heads, heads, 1)));
            values[at * HEAD_DIM..].copy_from_slice(&own);
        }
        let held = if decode { at * HEAD_DIM } else { length * HEAD_DIM };
        let stride = heads * HEAD_DIM + GAP;
        Ok(AttentionCall {
            decode,
            heads,
            m,
            at,
            qkv: guarded(stream, "qkv", &host)?,
            host,
            cache: cache(stream, &keys[..held], &values[..held])?,
            keys,
            values,
            table: kit::rope_table(stream)?,
            words: token_words(stream, m, at)?,
            scratch: AttnScratch::new(stream, heads, CONTEXT, m.min(ops::STEP_TOKENS))?,
            out: guarded(stream, "out", &vec![NAN16; FIRST + m * stride])?,
        })
    }
}

impl Call for AttentionCall {
    fn label(&self) -> String {
        let op = if self.decode { "attn_decode" } else { "attn_prefill" };
        format!("{op} {} heads, {} tokens at {}", self.heads, self.m, self.at)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.out.upload(stream, 0, &vec![NAN16; self.out.len()])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let stride = self.heads * HEAD_DIM + GAP;
        let output = AttnOutput { out: &mut self.out, first: FIRST, stride, planes: false, awaited: false };
        let tokens = StepTokens::list(&self.words, self.m);
        if self.decode {
            let (cache, scratch) = (&mut self.cache, &mut self.scratch);
            return ops::attn_decode(stream, &self.qkv, cache, &self.table, tokens, scratch, output);
        }
        ops::attn_prefill(stream, &self.qkv, self.heads, &self.cache, tokens, output)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let (heads, width) = (self.heads, self.heads * HEAD_DIM);
        let mut queries = to_f32(&self.host);
        if self.decode {
            reference::rope(&mut queries, heads + 2, self.at, THETA);
        }
        let queries = to_f32(&rounded(&part(&queries, heads, 0, heads)));
        let (keys, values) = (to_f32(&self.keys), to_f32(&self.values));
        let want = only(wanted, || reference::attention(&queries, &keys, &values, heads, self.at));
        let written = all(stream, &self.out)?;
        // Between the tokens' values nothing may be written: taken as an output that must stay as it was.
        let (mut got, mut gaps) = (Vec::new(), written[..FIRST].to_vec());
        for token in written[FIRST..].chunks(width + GAP) {
            got.extend(to_f32(&token[..width]));
            gaps.extend(&token[width..]);
        }
        let touched = gaps.iter().map(|&h| f32::from(u8::from(h != NAN16))).collect::<Vec<_>>();
        let zeros = vec![0.0; touched.len()];
        let mut outputs = vec![
            Output { name: "out", row: width, got, want, tolerance: ATTENTION_TOLERANCE },
            Output { name: "between the tokens of out", row: GAP, got: touched, want: zeros, tolerance: 0.0 },
        ];
        if self.decode {
            let rows = |buffer: &DevBuf<u16>| {
                Ok::<_, Error>(to_f32(&buffer.download(stream, self.at * HEAD_DIM, self.m * HEAD_DIM)?))
            };
            for (name, buffer, rows_wanted, tolerance) in [
                ("k_cache", &self.cache.k, &self.keys, F16_TOLERANCE),
                ("v_cache", &self.cache.v, &self.values, 0.0),
            ] {
                let want = to_f32(&rows_wanted[self.at * HEAD_DIM..]);
                outputs.push(Output { name, row: HEAD_DIM, got: rows(buffer)?, want, tolerance });
            }
        }
        Ok(outputs)
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "out": self.out, "qkv": self.qkv, "k_cache": self.cache.k, "v_cache": self.cache.v,
            "table": self.table)
    }

    fn work(&self) -> Work {
        let seen: f64 = (0..self.m).map(|t| (self.at + t + 1) as f64).sum();
        let moved = self.m * (2 * self.heads + 2) * HEAD_DIM * 2;
        Work {
            bytes: ((self.at + self.m) * 4 * HEAD_DIM + moved) as f64,
            flop: seen * (4 * self.heads * HEAD_DIM) as f64,
        }
    }
}
