//! The table that embedding and head share: `table_repack`, `table_pack`, `embed`, `head`.

use std::sync::OnceLock;

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::near::{self, Near};
use super::step::StepTokens;
use super::{GEMV_TOKENS, call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::layout::{UNIT_INPUTS, UNIT_ROWS};

/// The table of embedding and head, in units.
pub struct Table {
    /// `[vocab / 16][hidden / 64]` times 1024 f16, or what [`table_pack`] made of them, 12 bits a value.
    pub units: DevBuf<u16>,
    /// Rows.
    pub vocab: usize,
    /// Inputs.
    pub hidden: usize,
    /// The units are packed.
    pub packed: bool,
    near: OnceLock<Near>,
}

impl Table {
    /// 16-bit words of the units of such a table.
    #[must_use]
    pub fn words(vocab: usize, hidden: usize, packed: bool) -> usize {
        if packed { vocab * hidden / 4 * 3 } else { vocab * hidden }
    }

    /// A table [vocab, hidden] of these units.
    #[must_use]
    pub fn new(units: DevBuf<u16>, vocab: usize, hidden: usize, packed: bool) -> Table {
        Table { units, vocab, hidden, packed, near: OnceLock::new() }
    }

    /// Bytes of the copy that [`Table::lay_near`] would make; 0: none, or it is there.
    pub fn near_bytes(&self, stream: &Stream) -> Result<u64> {
        if self.near.get().is_some() { Ok(0) } else { near::table_bytes(stream, self) }
    }

    /// Makes a copy of this table that `head` reads faster for more than [`GEMV_TOKENS`](super::GEMV_TOKENS) tokens, with the same sums; not
    /// where L2 has no sides. Waits for the stream. Such calls must not run side by side: they must be of one stream.
    pub fn lay_near(&self, stream: &Stream) -> Result<()> {
        if self.near_bytes(stream)? > 0 {
            let _ = self.near.set(near::lay_table(stream, self)?); // somebody else was faster
        }
        Ok(())
    }

    /// Bytes of device memory, with the copy of [`Table::lay_near`].
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.units.bytes() + self.near.get().map_or(0, Near::bytes)
    }

    pub(super) fn require(&self, op: &str) -> Result<()> {
        self.units.require(op, Table::words(self.vocab, self.hidden, self.packed))
    }
}

/// `embed`: `x[m] = table[id of token m]`, f32.
#[allow(unsafe_code)]
pub fn embed(stream: &Stream, table: &Table, tokens: StepTokens<'_>, x: &mut DevBuf<f32>) -> Result<()> {
    let op = "embed";
    table.require(op)?;
    x.require(op, tokens.count * table.hidden)?;
    let params = ffi::EmbedParams {
        units: table.units.ptr(stream),
        token: tokens.ptr(op, stream)?,
        x: x.ptr_mut(stream),
        tokens: u32_of(op, tokens.count)?,
        hidden: u32_of(op, table.hidden)?,
        vocab: u32_of(op, table.vocab)?,
        packed: u32::from(table.packed),
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
    table.require(op)?;
    x.require(op, (first + tokens) * table.hidden)?;
    logits.require(op, (row + tokens) * table.vocab)?;
    let mut params = ffi::HeadParams {
        units: table.units.ptr(stream),
        x: x.ptr(stream).wrapping_add(first * table.hidden),
        logits: logits.ptr_mut(stream).wrapping_add(row * table.vocab),
        tokens: u32_of(op, tokens)?,
        hidden: u32_of(op, table.hidden)?,
        vocab: u32_of(op, table.vocab)?,
        packed: u32::from(table.packed),
        ..ffi::HeadParams::default()
    };
    // What does not read the copy takes no words: the next one's would be of the wrong turn.
    let near = table.near.get().filter(|_| tokens > GEMV_TOKENS && super::is_built_in(op));
    if let Some(near) = near {
        (params.near, params.sides, params.claims) = (near.ptr(stream), near.sides(), near.claims(stream));
    }
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

/// `table_pack`: the table with 12 bits a value, without loss; `None` if a value has more than 8 significant bits, or is 1/4 or more. Waits
/// for the answer.
#[allow(unsafe_code)]
pub fn table_pack(stream: &Stream, table: &Table) -> Result<Option<Table>> {
    let op = "table_pack";
    let &Table { vocab, hidden, packed, .. } = table;
    if packed {
        return Err(Error::Cuda { op: op.into(), what: "the table is packed already".into() });
    }
    table.require(op)?;
    let mut units = DevBuf::zeros(stream, "packed table", Table::words(vocab, hidden, true))?;
    let mut misfit = DevBuf::<u32>::zeros(stream, "misfit", 1)?;
    let params = ffi::TablePackParams {
        units: table.units.ptr(stream),
        packed: units.ptr_mut(stream),
        misfit: misfit.ptr_mut(stream),
        count: u32_of(op, vocab * hidden / (UNIT_ROWS * UNIT_INPUTS))?,
    };
    call!(table_pack, stream, params)?;
    let fits = misfit.download(stream, 0, 1)? == [0];
    Ok(fits.then_some(Table::new(units, vocab, hidden, true)))
}
