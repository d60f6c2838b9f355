//! The weights of a model on the GPU, each held once (what decode steps read on Hopper, twice), and the way they get there.
//!
//! ```text
//! mapped file --threads--> pinned half --copy engine--> raw tensors on the GPU --repack kernel--> units
//! ```
//!
//! Raw tensors of one matrix at a time lie in one scratch buffer (45 MB for Falcon-7B), so loading never holds the weights
//! twice, but for the table while it is packed, before all else is there. Resident: 110 MB a layer and 443 MB for the table that
//! embedding and head share, or 591 if its values need 16 bits.

mod on_sides;
mod size;

use crate::checkpoint::{Checkpoint, FloatTensor, GptqTensor, NormTensors};
use crate::error::{Error, Result};
use crate::gpu::context::Event;
use crate::gpu::ops::{self, Int4Matrix, Norm, RawGptq, Table};
use crate::gpu::{DevBuf, Gpu, Staging, Stream, total_time};
use crate::inspect;
use crate::layout::UNIT_ROWS;
use crate::reference;
use crate::repack::InputOrder;
use crate::timing::LoadTimes;
use on_sides::WeightsOnSides;

/// Called with bytes done and bytes in all.
pub(crate) type Progress = fn(done_bytes: u64, total_bytes: u64);

/// One decoder layer.
pub(crate) struct Layer {
    pub(crate) norm: Norm,
    /// Rows of `query_key_value`, then of `dense_h_to_4h`; both read the norm's output.
    pub(crate) qkv_up: Int4Matrix,
    pub(crate) qkv_up_bias: Option<DevBuf<f32>>,
    /// Act-order: which value of the norm's output each input of the two parts is.
    pub(crate) qkv_source: Option<DevBuf<u32>>,
    pub(crate) up_source: Option<DevBuf<u32>>,
    /// The two parts have one order (or none), so one launch computes both.
    pub(crate) one_source: bool,
    /// Inputs of `dense_4h_to_h`, then of `dense`; both add to the residual.
    pub(crate) down_dense: Int4Matrix,
    pub(crate) down_dense_bias: Option<DevBuf<f32>>,
    pub(crate) down_dense_source: Option<DevBuf<u32>>,
}

/// All weights.
pub(crate) struct Weights {
    pub(crate) embedding: Table,
    /// `None`: the embedding is the head.
    head: Option<Table>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Norm,
    /// `[max_positions, 32, 2]`: cos and sin.
    pub(crate) rope_table: DevBuf<f32>,
    /// What a decode step reads once more, see [`Weights::lay_on_sides`].
    pub(crate) on_sides: Option<WeightsOnSides>,
}

impl Weights {
    /// Uploads and repacks everything; returns when it is done.
    ///
    /// # Errors
    /// Out of GPU memory, a driver failure, or a group size the kernels do not take.
    pub(crate) fn load(
        gpu: &Gpu,
        stream: &Stream,
        checkpoint: &Checkpoint,
        progress: Option<Progress>,
        times: &mut LoadTimes,
    ) -> Result<Weights> {
        let config = checkpoint.config();
        refuse_if_too_large(gpu, checkpoint)?;
        let mut loader = Loader::new(gpu, stream, checkpoint, progress)?;
        let embedding = loader.table(checkpoint.embedding())?;
        let head = checkpoint.lm_head().map(|table| loader.table(table)).transpose()?;
        let layers = (0..config.num_layers).map(|i| loader.layer(checkpoint, i)).collect::<Result<_>>()?;
        let final_norm = loader.norm(checkpoint.final_norm(), config.norm_epsilon)?;
        let table = reference::rope_table(config.rope_theta, config.max_positions);
        let rope_table = DevBuf::from_host(stream, "rotary table", &table)?;
        stream.synchronize()?;
        let (filling, waiting) = loader.staging.host_times();
        times.within("filling pinned memory", filling);
        times.within("waiting for a copy to leave it", waiting);
        times.within("copies to the GPU", loader.staging.copy_time()?);
        times.within("repacking on the GPU", total_time(&loader.repacks)?);
        times.lap("weights");
        Ok(Weights { embedding, head, layers, final_norm, rope_table, on_sides: None })
    }

    /// The table of the head.
    pub(crate) fn head(&self) -> &Table {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The quantised matrices of all layers.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Int4Matrix> {
        self.layers.iter().flat_map(|l| [&l.qkv_up, &l.down_dense])
    }

    /// Whether a matrix stores zero points.
    pub(crate) fn has_zeros(&self) -> bool {
        self.matrices().any(|w| w.has_zeros)
    }

    /// Whether a layer gathers its activations.
    pub(crate) fn act_order(&self) -> bool {
        let sources =
            |l: &Layer| l.qkv_source.is_some() || l.up_source.is_some() || l.down_dense_source.is_some();
        self.layers.iter().any(sources)
    }
}

/// Says at once, and not after half of the upload, that the weights do not fit.
fn refuse_if_too_large(gpu: &Gpu, checkpoint: &Checkpoint) -> Result<()> {
    let needed_bytes = inspect::resident_weight_bytes(checkpoint);
    let (free, _) = gpu.memory()?;
    if needed_bytes <= free {
        return Ok(());
    }
    Err(Error::OutOfGpuMemory { what: "the model's weights".into(), needed_bytes, free_bytes: Some(free) })
}

struct Loader<'a> {
    stream: &'a Stream,
    staging: Staging,
    /// Raw tensors of the matrix, or rows of the table, being repacked.
    raw: DevBuf<u8>,
    threads: usize,
    /// Before and behind each repack kernel.
    repacks: Vec<(Event, Event)>,
    progress: Option<Progress>,
    done_bytes: u64,
    total_bytes: u64,
}

/// Offsets of raw tensors are multiples of this, so that kernels may read whole words.
const RAW_ALIGN: usize = 256;
/// Threads that fill a staging half; one core copies at some 10 GB/s, the bus takes 55.
const FILL_THREADS: usize = 6;

impl<'a> Loader<'a> {
    fn new(
        gpu: &Gpu,
        stream: &'a Stream,
        checkpoint: &Checkpoint,
        progress: Option<Progress>,
    ) -> Result<Loader<'a>> {
        let config = checkpoint.config();
        let mut raw_bytes = Staging::HALF_BYTES;
        let mut total_bytes =
            2 * checkpoint.embedding().len() + checkpoint.lm_head().map_or(0, |t| 2 * t.len());
        for i in 0..config.num_layers {
            let layer = checkpoint.layer(i);
            for w in [&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h] {
                // Codes, zero points, scales, groups, sources.
                let bytes = w.qweight.len() + w.qzeros.len() + w.scales.len() * 2 + w.k / 32 * 4 + w.k * 4;
                raw_bytes = raw_bytes.max(bytes + 5 * RAW_ALIGN);
                total_bytes += bytes;
            }
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(FILL_THREADS);
        Ok(Loader {
            stream,
            staging: Staging::new(gpu, stream)?,
            raw: DevBuf::zeros(stream, "upload buffer", raw_bytes)?,
            threads,
            repacks: Vec::new(),
            progress,
            done_bytes: 0,
            total_bytes: total_bytes as u64,
        })
    }

    fn advance(&mut self, bytes: usize) {
        self.done_bytes = (self.done_bytes + bytes as u64).min(self.total_bytes);
        if let Some(progress) = self.progress {
            progress(self.done_bytes, self.total_bytes);
        }
    }

    /// Copies `bytes` to `raw[at ..]`.
    fn upload(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        for (i, part) in bytes.chunks(Staging::HALF_BYTES).enumerate() {
            let threads = self.threads;
            self.staging.copy(
                self.stream,
                &mut self.raw,
                at + i * Staging::HALF_BYTES,
                part.len(),
                |host| {
                    each_part(host, part, threads, 1, 1, |to, from| to.copy_from_slice(from));
                },
            )?;
            self.advance(part.len());
        }
        Ok(())
    }

    /// Copies the values as f16 to `raw[at ..]`.
    fn upload_f16(&mut self, at: usize, tensor: FloatTensor<'_>) -> Result<()> {
        let size = tensor.dtype.size();
        for (i, part) in tensor.bytes.chunks(Staging::HALF_BYTES / 2 * size).enumerate() {
            let (threads, bytes) = (self.threads, part.len() / size * 2);
            self.staging.copy(self.stream, &mut self.raw, at + i * Staging::HALF_BYTES, bytes, |host| {
                each_part(host, part, threads, 2, size, |to, from| tensor.dtype.fill_f16(to, from));
            })?;
            self.advance(bytes);
        }
        Ok(())
    }

    fn table(&mut self, table: FloatTensor<'_>) -> Result<Table> {
        let [vocab, hidden] = table.shape;
        let mut units = DevBuf::zeros(self.stream, "embedding", vocab * hidden)?;
        let rows_at_once = Staging::HALF_BYTES / 2 / hidden / UNIT_ROWS * UNIT_ROWS;
        for first in (0..vocab).step_by(rows_at_once.max(UNIT_ROWS)) {
            let rows = rows_at_once.max(UNIT_ROWS).min(vocab - first);
            self.upload_f16(0, table.rows(first, rows))?;
            timed(self.stream, &mut self.repacks, || {
                ops::table_repack(self.stream, &self.raw, rows, hidden, &mut units, first)
            })?;
        }
        let table = Table::new(units, vocab, hidden, false);
        let mut packed = None;
        timed(self.stream, &mut self.repacks, || {
            packed = ops::table_pack(self.stream, &table)?;
            Ok(())
        })?;
        Ok(packed.unwrap_or(table))
    }

    fn norm(&mut self, norm: NormTensors<'_>, epsilon: f32) -> Result<Norm> {
        Ok(Norm {
            weight: DevBuf::from_host(self.stream, "norm weight", &norm.weight.to_f32())?,
            bias: DevBuf::from_host(self.stream, "norm bias", &norm.bias.to_f32())?,
            epsilon,
        })
    }

    fn layer(&mut self, checkpoint: &Checkpoint, index: usize) -> Result<Layer> {
        let t = checkpoint.layer(index);
        let norm = self.norm(t.input_layernorm, checkpoint.config().norm_epsilon)?;
        let (qkv, up, down, dense) = (&t.query_key_value, &t.dense_h_to_4h, &t.dense_4h_to_h, &t.dense);
        let (qkv_order, up_order) = (InputOrder::of(qkv)?, InputOrder::of(up)?);
        let (down_order, dense_order) = (InputOrder::of(down)?, InputOrder::of(dense)?);

        let mut qkv_up = self.matrix(qkv.n + up.n, qkv.k, [(qkv, &qkv_order), (up, &up_order)])?;
        self.repack(qkv, &qkv_order, &mut qkv_up, 0, 0)?;
        self.repack(up, &up_order, &mut qkv_up, qkv.n, 0)?;
        timed(self.stream, &mut self.repacks, || ops::row_factors(self.stream, &mut qkv_up))?;
        let mut down_dense = self
            .matrix(down.n, down.k + dense.k, [(down, &down_order), (dense, &dense_order)])?
            .with_attn_input(down.k);
        self.repack(down, &down_order, &mut down_dense, 0, 0)?;
        self.repack(dense, &dense_order, &mut down_dense, 0, down.k)?;
        timed(self.stream, &mut self.repacks, || ops::row_factors(self.stream, &mut down_dense))?;

        let qkv_up_bias = (qkv.bias.is_some() || up.bias.is_some()).then(|| {
            let part = |w: &GptqTensor<'_>| w.bias.map_or(vec![0.0; w.n], |b| b.to_f32());
            [part(qkv), part(up)].concat()
        });
        // Both add to the residual, so their biases add up.
        let down_dense_bias = match (down.bias, dense.bias) {
            (None, None) => None,
            (Some(b), None) | (None, Some(b)) => Some(b.to_f32()),
            (Some(a), Some(b)) => Some(a.to_f32().iter().zip(b.to_f32()).map(|(a, b)| a + b).collect()),
        };
        let bias = |b: Option<Vec<f32>>| b.map(|b| DevBuf::from_host(self.stream, "bias", &b)).transpose();
        let source = |s: &Option<Vec<u32>>| {
            s.as_ref().map(|s| DevBuf::from_host(self.stream, "input order", s)).transpose()
        };
        Ok(Layer {
            norm,
            one_source: qkv_order.source == up_order.source,
            qkv_source: source(&qkv_order.source)?,
            up_source: source(&up_order.source)?,
            qkv_up_bias: bias(qkv_up_bias)?,
            qkv_up,
            down_dense_source: source(&joined_source(&down_order, down.k, &dense_order, dense.k))?,
            down_dense_bias: bias(down_dense_bias)?,
            down_dense,
        })
    }

    /// An unset matrix that can hold both parts.
    fn matrix(&self, n: usize, k: usize, parts: [(&GptqTensor<'_>, &InputOrder); 2]) -> Result<Int4Matrix> {
        let scales_per_row = parts.iter().map(|(_, order)| order.scales_per_row).max().unwrap_or(1);
        let has_zeros = parts.iter().any(|(w, _)| w.constant_zero != Some(8));
        Int4Matrix::new(self.stream, n, k, scales_per_row, has_zeros)
    }

    fn repack(
        &mut self,
        w: &GptqTensor<'_>,
        order: &InputOrder,
        to: &mut Int4Matrix,
        row0: usize,
        input0: usize,
    ) -> Result<()> {
        let mut end = 0;
        let mut place = |bytes: usize| {
            let at = end;
            end = (at + bytes).next_multiple_of(RAW_ALIGN);
            at
        };
        let words = |values: &[u32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        let (qweight, qzeros) = (place(w.qweight.len()), place(w.qzeros.len()));
        let (scales, group) = (place(w.scales.len() * 2), place(order.group.len() * 4));
        let source_input = order.source.as_ref().map(|s| place(s.len() * 4));
        self.upload(qweight, w.qweight)?;
        self.upload(qzeros, w.qzeros)?;
        self.upload_f16(scales, w.scales)?;
        self.upload(group, &words(&order.group))?;
        if let (Some(at), Some(source)) = (source_input, &order.source) {
            self.upload(at, &words(source))?;
        }
        let raw = RawGptq {
            bytes: &self.raw,
            qweight,
            qzeros,
            scales,
            group,
            source_input,
            n: w.n,
            k: w.k,
            groups: w.groups(),
            zero_offset: w.zero_offset,
        };
        timed(self.stream, &mut self.repacks, || ops::gptq_repack(self.stream, &raw, to, row0, input0))
    }
}

/// Launches a kernel between two events.
fn timed(
    stream: &Stream,
    spans: &mut Vec<(Event, Event)>,
    launch: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = stream.record(true)?;
    launch()?;
    spans.push((before, stream.record(true)?));
    Ok(())
}

/// The order of the inputs `[down | dense]`, if either has one.
fn joined_source(down: &InputOrder, down_k: usize, dense: &InputOrder, dense_k: usize) -> Option<Vec<u32>> {
    if down.source.is_none() && dense.source.is_none() {
        return None;
    }
    let natural = |k: usize| (0..k as u32).collect();
    let mut joined = down.source.clone().unwrap_or_else(|| natural(down_k));
    joined.extend(dense.source.clone().unwrap_or_else(|| natural(dense_k)).iter().map(|k| k + down_k as u32));
    Some(joined)
}

/// Calls `fill` on matching parts of `to` (elements of `to_size` bytes) and `from` (of `from_size`), one part a thread.
fn each_part(
    to: &mut [u8],
    from: &[u8],
    threads: usize,
    to_size: usize,
    from_size: usize,
    fill: impl Fn(&mut [u8], &[u8]) + Sync,
) {
    /// Below this a thread costs more than it saves.
    const MIN_PART: usize = 1 << 20;
    let elems = (from.len() / from_size).div_ceil(threads).max(MIN_PART);
    std::thread::scope(|scope| {
        let mut parts = to.chunks_mut(elems * to_size).zip(from.chunks(elems * from_size));
        let first = parts.next();
        for (to, from) in parts {
            scope.spawn(|| fill(to, from));
        }
        if let Some((to, from)) = first {
            fill(to, from);
        }
    });
}
