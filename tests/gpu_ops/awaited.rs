//! gptq_batch behind attn_decode: attention begins before the product in front of it has ended, and the one behind before attention has.

use peregrine::gpu::ops::{
    self, Activations, AttnOutput, AttnScratch, MatmulKernel, MatmulOutput, NextProduct, StepTokens,
};
use peregrine::gpu::{DevBuf, StepGraph, Stream};
use peregrine::lab::CONTEXT;
use peregrine::lab::kit::rope_table;
use peregrine::layout::HEAD_DIM;

use crate::kit::*;

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// Each op has ended when the next is launched.
    Calm,
    InARow,
    /// As a decode step is: the last product overtakes attention.
    Captured,
}

/// A layer's [qkv ; up], attention and [down | dense].
struct Layer {
    heads: usize,
    ffn: usize,
    slices: usize,
    up: ops::Int4Matrix,
    down: ops::Int4Matrix,
    table: DevBuf<f32>,
}

impl Layer {
    fn new(stream: &Stream, heads: usize, ffn: usize, slices: usize) -> Layer {
        let (hidden, random) = (heads * HEAD_DIM, &mut Random::new(ffn as u64));
        let up = Quantised::new(random, (heads + 2) * HEAD_DIM + ffn, hidden, G64);
        let down = Quantised::new(random, hidden, ffn + hidden, G64);
        let table = rope_table(stream).unwrap();
        let on_gpu = |q: &Quantised| repack(stream, q.n, q.k, &[(q, 0, 0)]);
        Layer { heads, ffn, slices, up: on_gpu(&up), down: on_gpu(&down).with_attn_input(ffn), table }
    }

    /// From now on products read copies of the weights, where L2 has sides.
    fn lay_near(&self, stream: &Stream) {
        self.up.lay_near(stream, 1).unwrap();
        self.down.lay_near(stream, self.slices).unwrap();
    }

    /// The layer for one input after the other; gives the sums of each.
    fn run(
        &self,
        stream: &Stream,
        inputs: &[DevBuf<u16>],
        positions: &[usize],
        awaited: bool,
        how: How,
    ) -> Vec<Vec<f32>> {
        let (heads, ffn, m) = (self.heads, self.ffn, positions.len());
        let reach = positions.iter().max().unwrap() + 1;
        let (hidden, qkv_size, wide) = (heads * HEAD_DIM, (heads + 2) * HEAD_DIM, ffn + heads * HEAD_DIM);
        let words: Vec<u32> =
            positions.iter().enumerate().flat_map(|(i, &at)| [0, at as u32, i as u32, i as u32]).collect();
        let words = DevBuf::from_host(stream, "tokens", &words).unwrap();
        let mut cache = ops::LayerCache::new(stream, m, CONTEXT).unwrap();
        let cached = Random::new(3).halves(m * CONTEXT * HEAD_DIM, 1.0);
        cache.k.upload(stream, 0, &cached).unwrap();
        cache.v.upload(stream, 0, &cached).unwrap();
        let mut scratch = AttnScratch::new(stream, heads, CONTEXT, m).unwrap();
        let (mut qkv, mut x) = (nan16(stream, m * qkv_size), nan16(stream, m * wide));
        let mut sums: Vec<_> = inputs.iter().map(|_| nan32(stream, self.slices * m * hidden)).collect();
        let front = |stream: &Stream, input, qkv: &mut _, x: &mut _, scratch: &AttnScratch| {
            let a = Activations { x: input, stride: hidden, tokens: m, planes: false, attention: None };
            let (split_row, gelu_stride) = (qkv_size, wide);
            let announced = awaited.then_some(scratch);
            let next = Some(NextProduct { w: &self.down, slices: self.slices });
            let output = MatmulOutput::Split {
                out: qkv,
                gelu_out: x,
                gelu_stride,
                split_row,
                planes: false,
                bias: None,
                announced,
                next,
            };
            ops::gptq_matmul(stream, MatmulKernel::Batch, &self.up, 0..self.up.n, a, 1, output).unwrap();
        };
        if awaited && how != How::Calm {
            // A product behind which no attention comes, and attention behind which no product comes, change nothing, once forgotten.
            front(stream, &inputs[0], &mut qkv, &mut x, &scratch);
            scratch.forget(stream).unwrap();
            front(stream, &inputs[0], &mut qkv, &mut x, &scratch);
            let output = AttnOutput { out: &mut x, first: ffn, stride: wide, planes: false, awaited };
            let tokens = StepTokens::list(&words, m).within(reach);
            ops::attn_decode(stream, &qkv, &mut cache, &self.table, tokens, &mut scratch, output).unwrap();
            scratch.forget(stream).unwrap();
        }
        let mut layers = |stream: &Stream| {
            let settle = || {
                if how == How::Calm {
                    stream.synchronize().unwrap();
                }
            };
            for (input, sums) in inputs.iter().zip(&mut sums) {
                front(stream, input, &mut qkv, &mut x, &scratch);
                settle();
                let output = AttnOutput { out: &mut x, first: ffn, stride: wide, planes: false, awaited };
                let tokens = StepTokens::list(&words, m).within(reach);
                ops::attn_decode(stream, &qkv, &mut cache, &self.table, tokens, &mut scratch, output)?;
                settle();
                let attention = awaited.then_some(&scratch);
                let a = Activations { x: &x, stride: wide, tokens: m, planes: false, attention };
                let output = MatmulOutput::Partials(sums);
                ops::gptq_matmul(stream, MatmulKernel::Batch, &self.down, 0..hidden, a, self.slices, output)?;
                settle();
            }
            Ok(())
        };
        if how == How::Captured {
            let mut graph = StepGraph::capture(stream, layers).unwrap();
            graph.launch().unwrap();
            stream.synchronize().unwrap();
        } else {
            layers(stream).unwrap();
        }
        let all = |sums: &DevBuf<f32>| sums.download(stream, 0, sums.len()).unwrap();
        sums.iter().map(all).collect()
    }
}

/// The sums are those of a product behind attention that has ended, in a stream and in a graph, time after time, by plain units and by their
/// copy, and of one that does not know of attention: with the 7B's shapes, where attention's inputs begin a slice, where they begin within
/// one, and with one slice for all; from 27 tokens on, where contexts are short, two warps or one have all keys of 16 heads.
#[test]
fn gptq_batch_awaits_attention() {
    let Some((_, stream)) = gpu() else { return };
    for (heads, ffn, slices) in [(71, 18176, 5), (5, 1280, 5), (5, 1216, 4), (3, 320, 1)] {
        let (layer, by_copy) =
            (Layer::new(&stream, heads, ffn, slices), Layer::new(&stream, heads, ffn, slices));
        by_copy.lay_near(&stream);
        for (m, position) in
            [(9, 0), (16, 130), (27, 300), (32, 255), (33, 600), (64, 2047), (48, 511), (64, 100), (64, 639)]
        {
            let positions: Vec<usize> = (0..m).map(|i| position - (i % 5 * 31).min(position)).collect();
            let inputs: Vec<_> = (0..12)
                .map(|i| {
                    let values = Random::new(100 + i).halves(m * heads * HEAD_DIM, 1.0);
                    DevBuf::from_host(&stream, "x", &values).unwrap()
                })
                .collect();
            let want = layer.run(&stream, &inputs, &positions, true, How::Calm);
            assert!(want.iter().flatten().all(|sum| sum.is_finite()));
            assert!(want.windows(2).all(|two| two[0] != two[1]), "inputs differ, sums do not");
            let what = format!("heads {heads} m {m} at {position}");
            let unaware = layer.run(&stream, &inputs, &positions, false, How::Calm);
            assert!(unaware == want, "{what}: sums that do not know of attention differ");
            for (run, how) in [How::InARow, How::Captured, How::Captured].into_iter().enumerate() {
                for (weights, layer) in [("plain", &layer), ("copied", &by_copy)] {
                    let got = layer.run(&stream, &inputs, &positions, true, how);
                    let differ = got.iter().zip(&want).position(|(got, want)| got != want);
                    assert!(
                        differ.is_none(),
                        "{what}, run {run} of {weights} weights: sums {differ:?} differ"
                    );
                }
            }
        }
    }
}
