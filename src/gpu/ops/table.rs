//! The f16 table that embedding and head share: `table_repack`, `embed`, `head`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::step::StepTokens;
use super::{call, check, launch_on, u32_of};
use crate::error::Result;

/// The f16 table of embedding and head, in units.
pub struct Table {
    /// `[vocab / 16][hidden / 64][1024]` f16.
    pub units: DevBuf<u16>,
    /// Rows.
    pub vocab: usize,
    /// Inputs.
    pub hidden: usize,
}

/// `embed`: `x[m] = table[id of token m]`, f32.
#[allow(unsafe_code)]
pub fn embed(stream: &Stream, table: &Table, tokens: StepTokens<'_>, x: &mut DevBuf<f32>) -> Result<()> {
    let op = "embed";
    table.units.require(op, table.vocab * table.hidden)?;
    x.require(op, tokens.count * table.hidden)?;
    let params = ffi::EmbedParams {
        units: table.units.ptr(stream),
        token: tokens.ptr(op, stream)?,
        x: x.ptr_mut(stream),
        tokens: u32_of(op, tokens.count)?,
        hidden: u32_of(op, table.hidden)?,
        vocab: u32_of(op, table.vocab)?,
    };
    call!(embed, stream, params)
}

/// `head`: logits `[.., vocab]` f32, from row `row` on, of rows `first ..` of `x [.., hidden]`, at most
/// [`HEAD_TOKENS`](super::HEAD_TOKENS) tokens.
#[allow(unsafe_code)]
pub fn head(
    stream: &Stream,
    table: &Table,
    x: &DevBuf<u16>,
    first: usize,
    tokens: usize,
    logits: &mut DevBuf<f32>,
    row: usize,
) -> Result<()> {
    let op = "head";
    table.units.require(op, table.vocab * table.hidden)?;
    x.require(op, (first + tokens) * table.hidden)?;
    logits.require(op, (row + tokens) * table.vocab)?;
    let params = ffi::HeadParams {
        units: table.units.ptr(stream),
        x: x.ptr(stream).wrapping_add(first * table.hidden),
        logits: logits.ptr_mut(stream).wrapping_add(row * table.vocab),
        tokens: u32_of(op, tokens)?,
        hidden: u32_of(op, table.hidden)?,
        vocab: u32_of(op, table.vocab)?,
    };
    call!(head, stream, params)
}

/// `table_repack`: row-major f16 `rows x k` at the start of `table` to the units of rows `row0 ..`.
#[allow(unsafe_code)]
pub fn table_repack(
    stream: &Stream,
    table: &DevBuf<u8>,
    rows: usize,
    k: usize,
    units: &mut DevBuf<u16>,
    row0: usize,
) -> Result<()> {
    let op = "table_repack";
    table.require(op, rows * k * 2)?;
    units.require(op, (row0 + rows) * k)?;
    let params = ffi::TableRepackParams {
        table: table.ptr(stream).cast(),
        units: units.ptr_mut(stream),
        rows: u32_of(op, rows)?,
        k: u32_of(op, k)?,
        row0: u32_of(op, row0)?,
    };
    call!(table_repack, stream, params)
}
