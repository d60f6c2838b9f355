//! `decode_step`: one token of up to 8 sequences, or up to 8 tokens of one, from id to logits in one launch.

use super::super::Gpu;
use super::super::buffer::{DevBuf, MappedFault, StepFault};
use super::super::context::Stream;
use super::super::ffi;
use super::attention::{AttnScratch, LayerCache};
use super::matrix::Int4Matrix;
use super::on_sides::OnSides;
use super::rows::Norm;
use super::step::STEP_WORDS;
use super::table::Table;
use super::{GEMV_TOKENS, call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::layout::{HEAD_DIM, UNIT_INPUTS, UNIT_ROWS};

/// Most layers of a `decode_step` call.
pub const STEP_LAYERS: usize = ffi::PEREGRINE_STEP_LAYERS as usize;
/// Buffers that layers use in turn.
const TURNS: usize = ffi::PEREGRINE_STEP_TURNS as usize;
/// What a byte of a norm is until it is written: digits are -127 to 127. A word of them is `NO_DIGITS` of `cuda/decode_words.cuh`.
const NO_DIGIT: u8 = 0x80;
/// Polls before a block gives up. Each is a round trip to L2, so seconds, where a whole step takes a millisecond.
const PATIENCE: u32 = 1 << 22;

/// Blocks `decode_step` takes on a GPU, one a multiprocessor; 0 where it cannot run. Is to be called once before the first
/// `decode_step`.
pub fn decode_step_blocks(gpu: &Gpu, has_zeros: bool) -> Result<usize> {
    gpu.decode_step_blocks(has_zeros)
}

/// The shape of a model and of its caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeShape {
    /// Values of a token.
    pub hidden: usize,
    /// A multiple of `hidden`.
    pub ffn: usize,
    /// `hidden / 64`.
    pub heads: usize,
    /// Rows of embedding and head.
    pub vocab: usize,
    /// Sequences of the caches.
    pub slots: usize,
    /// Positions of a sequence.
    pub max_context: usize,
    /// All matrices store zero points, or none does.
    pub has_zeros: bool,
    /// What [`decode_step_blocks`] said.
    pub blocks: usize,
}

impl DecodeShape {
    fn qkv_size(&self) -> usize {
        (self.heads + 2) * HEAD_DIM
    }

    fn wide_size(&self) -> usize {
        self.ffn + self.hidden
    }

    /// As `cuda/decode_norm.cuh` lays them.
    fn norms_bytes(&self) -> usize {
        let records = (ffi::PEREGRINE_STEP_WARPS * ffi::PEREGRINE_NORM_RECORD) as usize;
        TURNS * GEMV_TOKENS * (2 * self.hidden + records)
    }
}

/// One layer: weights and cache.
pub struct DecodeLayer<'a> {
    /// In front of both branches.
    pub norm: &'a Norm,
    /// `[qkv + ffn, hidden]`
    pub qkv_up: &'a Int4Matrix,
    /// `[hidden, ffn + hidden]`
    pub down_dense: &'a Int4Matrix,
    /// Both once more, by the sides of L2: of all layers or of none. Then these are read.
    pub on_sides: Option<&'a (OnSides, OnSides)>,
    /// Keys and values.
    pub cache: &'a mut LayerCache,
}

/// A model, and the caches it appends to.
pub struct DecodeModel<'a> {
    /// At most [`STEP_LAYERS`].
    pub layers: Vec<DecodeLayer<'a>>,
    /// `[vocab, hidden]`
    pub embedding: &'a Table,
    /// `[vocab, hidden]`
    pub head: &'a Table,
    /// The head once more, by the sides of L2, if the layers are.
    pub head_on_sides: Option<&'a OnSides>,
    /// In front of the head.
    pub final_norm: &'a Norm,
    /// `[max_context, 32, 2]`: cos and sin.
    pub rope_table: &'a DevBuf<f32>,
}

/// What `decode_step` works in. It is as the next step needs it after each step; nothing else may write it.
pub struct DecodeScratch {
    shape: DecodeShape,
    /// `[2, 8, hidden]`: the residual stream of this step, and of the next.
    x: DevBuf<u64>,
    /// `[TURNS, 8, qkv_size]` f16
    qkv: DevBuf<u16>,
    /// `[TURNS, 8, ffn + hidden]` f16
    wide: DevBuf<u16>,
    /// `[TURNS, 8, 2 * hidden + 12 records]`: two bytes a value
    norms: DevBuf<u8>,
    /// `[8, hidden]` f16
    final_norm: DevBuf<u16>,
    attn: AttnScratch,
    /// `[2]`
    epoch: DevBuf<u32>,
    fault: MappedFault,
}

impl DecodeScratch {
    /// For steps of up to 8 tokens.
    pub fn new(gpu: &Gpu, stream: &Stream, shape: DecodeShape) -> Result<DecodeScratch> {
        // Values that no conversion gives: not there yet.
        let unset = |name, values: usize| DevBuf::from_host(stream, name, &vec![u16::MAX; values]);
        Ok(DecodeScratch {
            shape,
            x: DevBuf::zeros(stream, "residual stream of a step", 2 * GEMV_TOKENS * shape.hidden)?,
            qkv: unset("queries, keys, values of a step", TURNS * GEMV_TOKENS * shape.qkv_size())?,
            wide: unset("activations of a step", TURNS * GEMV_TOKENS * shape.wide_size())?,
            norms: DevBuf::from_host(stream, "norms of a step", &vec![NO_DIGIT; shape.norms_bytes()])?,
            final_norm: unset("last norm of a step", GEMV_TOKENS * shape.hidden)?,
            attn: AttnScratch::new(stream, shape.heads, shape.max_context, GEMV_TOKENS)?,
            epoch: DevBuf::zeros(stream, "epoch", 2)?,
            fault: MappedFault::new(gpu)?,
        })
    }

    /// What a block waited for in vain: then the kernel has trapped, and the process cannot use the GPU any more.
    #[must_use]
    pub fn fault(&self) -> Option<StepFault> {
        self.fault.get()
    }

    fn require(&self, op: &str) -> Result<()> {
        let DecodeShape { hidden, heads, max_context, .. } = self.shape;
        self.x.require(op, 2 * GEMV_TOKENS * hidden)?;
        self.qkv.require(op, TURNS * GEMV_TOKENS * self.shape.qkv_size())?;
        self.wide.require(op, TURNS * GEMV_TOKENS * self.shape.wide_size())?;
        self.norms.require(op, self.shape.norms_bytes())?;
        self.final_norm.require(op, GEMV_TOKENS * hidden)?;
        self.attn.require(op, heads, max_context, GEMV_TOKENS)?;
        self.epoch.require(op, 2)
    }
}

fn wrong(what: String) -> Error {
    Error::Cuda { op: "decode_step".into(), what }
}

/// The layer's pointers, after its buffers were found to have the shape.
fn layer_params(
    op: &str,
    stream: &Stream,
    shape: &DecodeShape,
    sides: u32,
    layer: &mut DecodeLayer<'_>,
) -> Result<ffi::DecodeLayer> {
    if layer.on_sides.is_some() != (sides != 0) {
        return Err(wrong("a part of the weights by the sides of L2, wanted all or none".into()));
    }
    let matrix = |w: &Int4Matrix, on_sides: Option<&OnSides>, n: usize, k: usize| -> Result<*const u8> {
        if (w.n, w.k, w.scales_per_row, w.has_zeros) != (n, k, 1, shape.has_zeros) {
            return Err(wrong(format!(
                "a matrix [{}, {}] with {} scales, zero points: {}; wanted [{n}, {k}] with 1, {}",
                w.n, w.k, w.scales_per_row, w.has_zeros, shape.has_zeros
            )));
        }
        let (tiles, tile_bytes) =
            (n / UNIT_ROWS, k / UNIT_INPUTS * Int4Matrix::unit_bytes(1, shape.has_zeros));
        if let Some(copy) = on_sides {
            return copy.ptr(op, stream, tiles, tile_bytes, sides);
        }
        w.units.require(op, tiles * tile_bytes)?;
        Ok(w.units.ptr(stream))
    };
    let cache = &mut *layer.cache;
    if (cache.slots, cache.max_context) != (shape.slots, shape.max_context) {
        return Err(wrong(format!("a cache of {} times {} positions", cache.slots, cache.max_context)));
    }
    cache.require(op)?;
    layer.norm.weight.require(op, shape.hidden)?;
    layer.norm.bias.require(op, shape.hidden)?;
    Ok(ffi::DecodeLayer {
        qkv_up: matrix(
            layer.qkv_up,
            layer.on_sides.map(|(w, _)| w),
            shape.qkv_size() + shape.ffn,
            shape.hidden,
        )?,
        down_dense: matrix(
            layer.down_dense,
            layer.on_sides.map(|(_, w)| w),
            shape.hidden,
            shape.wide_size(),
        )?,
        norm_weight: layer.norm.weight.ptr(stream),
        norm_bias: layer.norm.bias.ptr(stream),
        k_cache: cache.k.ptr_mut(stream),
        v_cache: cache.v.ptr_mut(stream),
    })
}

/// `decode_step`: the tokens of `step`, a `Step` whose number of tokens (at most 8; 0: nothing is done) the device knows, to `logits
/// [8, vocab]`. Two of them must not run at once, each could hold half of the multiprocessors and wait for ever: one stream for all.
#[allow(unsafe_code)]
pub fn decode_step(
    stream: &Stream,
    mut model: DecodeModel<'_>,
    step: &DevBuf<u32>,
    scratch: &mut DecodeScratch,
    logits: &mut DevBuf<f32>,
) -> Result<()> {
    let op = "decode_step";
    let shape = scratch.shape;
    let DecodeShape { hidden, ffn, heads, vocab, slots, max_context, .. } = shape;
    scratch.require(op)?;
    step.require(op, STEP_WORDS)?;
    logits.require(op, GEMV_TOKENS * vocab)?;
    model.rope_table.require(op, max_context * HEAD_DIM)?;
    model.final_norm.weight.require(op, hidden)?;
    model.final_norm.bias.require(op, hidden)?;
    for table in [model.embedding, model.head] {
        if (table.vocab, table.hidden) != (vocab, hidden) {
            return Err(wrong(format!("a table [{}, {}]", table.vocab, table.hidden)));
        }
        table.require(op)?;
    }
    if model.layers.len() > STEP_LAYERS {
        return Err(wrong(format!("{} layers, wanted at most {STEP_LAYERS}", model.layers.len())));
    }
    let sides = model.head_on_sides.map_or(0, OnSides::sides);
    let mut block_of = [0; ffi::PEREGRINE_STEP_SMS as usize];
    for (to, &block) in block_of.iter_mut().zip(stream.sides().map_or(&[][..], |s| s.block_of())) {
        *to = block;
    }
    let mut layer = [ffi::DecodeLayer::default(); STEP_LAYERS];
    for (to, from) in layer.iter_mut().zip(&mut model.layers) {
        *to = layer_params(op, stream, &shape, sides, from)?;
    }
    let (attn_partials, attn_arrivals) = scratch.attn.ptrs(stream);
    let params = ffi::DecodeStepParams {
        layer,
        embedding: model.embedding.units.ptr(stream).cast(),
        head: match model.head_on_sides {
            None => model.head.units.ptr(stream).cast(),
            Some(copy) => {
                let tiles = vocab / UNIT_ROWS;
                let tile_bytes = Table::words(UNIT_ROWS, hidden, model.head.packed) * 2;
                copy.ptr(op, stream, tiles, tile_bytes, sides)?
            }
        },
        final_weight: model.final_norm.weight.ptr(stream),
        final_bias: model.final_norm.bias.ptr(stream),
        table: model.rope_table.ptr(stream),
        step: step.ptr(stream).cast(),
        x: scratch.x.ptr_mut(stream),
        qkv: scratch.qkv.ptr_mut(stream),
        wide: scratch.wide.ptr_mut(stream),
        norms: scratch.norms.ptr_mut(stream),
        final_norm: scratch.final_norm.ptr_mut(stream),
        attn_partials,
        attn_arrivals,
        epoch: scratch.epoch.ptr_mut(stream),
        logits: logits.ptr_mut(stream),
        fault: scratch.fault.ptr_mut().cast(),
        layers: u32_of(op, model.layers.len())?,
        hidden: u32_of(op, hidden)?,
        ffn: u32_of(op, ffn)?,
        heads: u32_of(op, heads)?,
        vocab: u32_of(op, vocab)?,
        slots: u32_of(op, slots)?,
        max_context: u32_of(op, max_context)?,
        has_zeros: u32::from(shape.has_zeros),
        embedding_packed: u32::from(model.embedding.packed),
        head_packed: u32::from(model.head.packed),
        blocks: u32_of(op, shape.blocks)?,
        sides,
        block_of,
        patience: PATIENCE,
        epsilon: model.final_norm.epsilon,
    };
    call!(decode_step, stream, params)
}
