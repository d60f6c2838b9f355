//! One GPTQ matrix: its tensors, and what its data says.
//!
//! AutoGPTQ writes a linear layer of K inputs and N outputs as four or five tensors:
//!
//! ```text
//! qweight I32 [K / 8, N]    eight inputs per word, lowest nibble = lowest k
//! qzeros  I32 [G, N / 8]    eight outputs per word; version 1 stores zero - 1, version 2 stores zero
//! scales  F16 [G, N]
//! g_idx   I32 [K]           group of each input; k / group_size unless act-order permuted it
//! bias    F16 [N]           all zero in Falcon files of AutoGPTQ 0.2 to 0.7, absent in others
//! ```
//!
//! `W[n, k] = scales[g, n] * (code[k, n] - zero[g, n])`, exactly: the product is not rounded to f16. Zero points are 4 bits: `(stored + offset) & 15`. The
//! mask matters for asymmetric version 1: a zero point of 0 is stored as -1 = 15.

use super::container::{Container, Place};
use super::float::{FloatTensor, words};
use crate::error::Result;

/// Zero point of symmetric quantisation.
const SYMMETRIC_ZERO: u8 = 8;

/// A view of one quantised matrix, `y = x W^T + bias`, `W[n, k] = scale[g(k), n] * (code[k, n] - zero[g(k), n])`.
#[derive(Debug, Clone)]
pub struct GptqTensor<'a> {
    /// `transformer.h.3.mlp.dense_h_to_4h`
    pub name: String,
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs per group (k itself when the file says -1). The last group may be shorter.
    pub group_size: usize,
    /// [k / 8, n] little-endian words, lowest nibble = lowest k.
    pub qweight: &'a [u8],
    /// [groups, n / 8] little-endian words, lowest nibble = lowest n; the stored value, before `zero_offset`.
    pub qzeros: &'a [u8],
    /// 1 (v1) or 0 (v2): zero = (stored + zero_offset), masked to 4 bits as AutoGPTQ's kernels do for asymmetric v1.
    pub zero_offset: u8,
    /// Some(8) when every zero point of the matrix is 8.
    pub constant_zero: Option<u8>,
    /// [groups, n]
    pub scales: FloatTensor<'a>,
    /// Group of each input, `[k]` little-endian i32; `None` when it is k / group_size. Every value is a valid group,
    /// and every group has `group_size` inputs (the last one what is left).
    pub g_idx: Option<&'a [u8]>,
    /// [1, n]; `None` when absent or all zero.
    pub bias: Option<FloatTensor<'a>>,
}

impl GptqTensor<'_> {
    /// Number of groups: rows of `scales`.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group_size)
    }
}

/// Where the tensors of one matrix lie; names, dtypes and shapes are checked.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) name: String,
    k: usize,
    n: usize,
    group_size: usize,
    qweight: Place,
    qzeros: Place,
    scales: Place,
    g_idx: Option<Place>,
    bias: Option<Place>,
}

/// What a matrix's data says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MatrixFacts {
    /// The nibble every zero point is stored as, if they are all the same.
    pub(crate) stored_zero: Option<u8>,
    /// A zero point is stored as 15: ambiguous in version 1.
    pub(crate) stores_15: bool,
    /// `g_idx` is not k / group_size.
    pub(crate) act_order: bool,
    /// There is a bias that is not all zero.
    pub(crate) has_bias: bool,
}

impl Matrix {
    /// Finds the tensors of the linear layer `name` with `k` inputs and `n` outputs, `group_size` inputs per group
    /// (`None`: all of them). `bias` and `g_idx` must be there if the configuration says so.
    pub(crate) fn find(
        container: &Container,
        name: String,
        [k, n]: [usize; 2],
        group_size: Option<usize>,
        needs_bias: bool,
        act_order: bool,
    ) -> Result<Matrix> {
        let group_size = group_size.map_or(k, |size| size.min(k));
        let groups = k.div_ceil(group_size);
        let part = |part: &str| format!("{name}.{part}");
        let has = |part: &str| container.tensors.contains_key(&format!("{name}.{part}"));
        let qweight = container.int(&part("qweight"), [k / 8, n])?;
        let scales = container.float(&part("scales"), [groups, n]);
        let scales = scales.map_err(|e| explain_groups(container, &part("scales"), [k, group_size], e))?;
        let qzeros = container.int(&part("qzeros"), [groups, n / 8])?;
        let wants_g_idx = has("g_idx") || (act_order && groups > 1);
        let g_idx = if wants_g_idx { Some(container.int(&part("g_idx"), [1, k])?) } else { None };
        let wants_bias = needs_bias || has("bias");
        let bias = if wants_bias { Some(container.float(&part("bias"), [1, n])?) } else { None };
        Ok(Matrix { k, n, group_size, qweight, qzeros, scales, g_idx, bias, name })
    }

    /// Reads scales, zero points, `g_idx` and bias: everything but the codes, in which any bits are valid.
    ///
    /// # Errors
    /// Non-finite scales or bias, or ones outside half precision; a `g_idx` that is out of range, or that is not in
    /// order although `desc_act` is stated to be false, or that fills its groups unevenly.
    pub(crate) fn scan(&self, container: &Container, desc_act: Option<bool>) -> Result<MatrixFacts> {
        check_values(container, &format!("{}.scales", self.name), container.float_view(&self.scales), true)?;
        if let Some(bias) = &self.bias {
            check_values(container, &format!("{}.bias", self.name), container.float_view(bias), true)?;
        }
        let (all_and, all_or, has_15) =
            words(container.bytes(&self.qzeros)).fold((!0, 0, 0), |(and, or, f), w| {
                let pairs = w & (w >> 1);
                (and & w, or | w, f | (pairs & (pairs >> 2) & 0x1111_1111))
            });
        let nibble = all_or & 15;
        let uniform = all_and == all_or && all_or == nibble * 0x1111_1111;
        Ok(MatrixFacts {
            stored_zero: uniform.then_some(nibble as u8),
            stores_15: has_15 != 0,
            act_order: self.scan_g_idx(container, desc_act)?,
            has_bias: self.bias.as_ref().is_some_and(|b| !container.float_view(b).is_zero()),
        })
    }

    /// Whether `g_idx` differs from k / group_size.
    fn scan_g_idx(&self, container: &Container, desc_act: Option<bool>) -> Result<bool> {
        let Some(place) = &self.g_idx else { return Ok(false) };
        let wrong = |what: String| container.error(&format!("{}.g_idx", self.name), what);
        let groups = self.k.div_ceil(self.group_size);
        let mut members = vec![0usize; groups];
        let mut first_permuted = None;
        for (k, group) in words(container.bytes(place)).enumerate() {
            // A negative index is a huge one as u32.
            match members.get_mut(group as usize) {
                Some(count) => *count += 1,
                None => {
                    return Err(wrong(format!(
                        "value [{k}] is {}, wanted 0 to {}",
                        group as i32,
                        groups - 1
                    )));
                }
            }
            if group as usize != k / self.group_size && first_permuted.is_none() {
                first_permuted = Some((k, group));
            }
        }
        let Some((k, group)) = first_permuted else { return Ok(false) };
        if desc_act == Some(false) {
            let wanted = k / self.group_size;
            return Err(wrong(format!(
                "value [{k}] is {group}, wanted {wanted}: desc_act is false (no act-order)"
            )));
        }
        for (group, &count) in members.iter().enumerate() {
            let wanted = self.group_size.min(self.k - group * self.group_size);
            if count != wanted {
                return Err(wrong(format!("group {group} has {count} inputs, wanted {wanted}")));
            }
        }
        Ok(true)
    }

    /// The view of this matrix.
    pub(crate) fn view<'a>(
        &self,
        container: &'a Container,
        zero_offset: u8,
        facts: &MatrixFacts,
    ) -> GptqTensor<'a> {
        let symmetric = facts.stored_zero.is_some_and(|stored| is_symmetric(stored, zero_offset));
        GptqTensor {
            name: self.name.clone(),
            k: self.k,
            n: self.n,
            group_size: self.group_size,
            qweight: container.bytes(&self.qweight),
            qzeros: container.bytes(&self.qzeros),
            zero_offset,
            constant_zero: symmetric.then_some(SYMMETRIC_ZERO),
            scales: container.float_view(&self.scales),
            g_idx: self.g_idx.as_ref().filter(|_| facts.act_order).map(|place| container.bytes(place)),
            bias: self.bias.as_ref().filter(|_| facts.has_bias).map(|place| container.float_view(place)),
        }
    }
}

/// Whether a zero point stored as `stored` is that of symmetric quantisation.
pub(crate) fn is_symmetric(stored: u8, zero_offset: u8) -> bool {
    (stored + zero_offset) & 15 == SYMMETRIC_ZERO
}

/// Every value of the tensor must be finite and, with `fits_f16`, stay finite in half precision.
pub(crate) fn check_values(
    container: &Container,
    name: &str,
    t: FloatTensor<'_>,
    fits_f16: bool,
) -> Result<()> {
    let Some(i) = t.first_bad(fits_f16) else { return Ok(()) };
    Err(bad_value(container, name, t.shape, i, t.get(i)))
}

/// The error about value number `i` of tensor `name`.
pub(crate) fn bad_value(
    container: &Container,
    name: &str,
    shape: [usize; 2],
    i: usize,
    value: f32,
) -> crate::Error {
    let (row, col) = (i / shape[1], i % shape[1]);
    let place = if shape[0] == 1 { format!("[{col}]") } else { format!("[{row}, {col}]") };
    let wanted =
        if value.is_finite() { "at most 65504 in magnitude (half precision)" } else { "a finite number" };
    container.error(name, format_args!("value {place} is {value}, wanted {wanted}"))
}

/// Adds to a wrong shape of `scales` which group size would fit it.
fn explain_groups(
    container: &Container,
    name: &str,
    [k, group_size]: [usize; 2],
    error: crate::Error,
) -> crate::Error {
    let Some(&[rows, _]) = container.tensors.get(name).map(|t| &t.shape[..]) else { return error };
    if rows == 0 || rows == k.div_ceil(group_size) {
        return error;
    }
    let wanted = k.div_ceil(group_size);
    container.error(
        name,
        format_args!(
            "has {rows} groups for {k} inputs, wanted {wanted}: group_size {group_size} does not match the file, {} would",
            k.div_ceil(rows)
        ),
    )
}

/// Version of the stored zero points: 1 (stored minus one) or 0 (`gptq_v2`).
///
/// Some writers label v2 files as v1. A symmetric file gives itself away: its zero points are all 8, stored as 7 in
/// v1 and as 8 in v2. Where the data is not that plain, or quantisation is stated to be asymmetric, the label counts.
pub(crate) fn zero_offset(facts: &[MatrixFacts], labelled_v2: bool, sym: Option<bool>) -> u8 {
    let all_stored_as = |nibble| facts.iter().all(|f| f.stored_zero == Some(nibble));
    if sym != Some(false) {
        if all_stored_as(SYMMETRIC_ZERO - 1) {
            return 1;
        }
        if all_stored_as(SYMMETRIC_ZERO) {
            return 0;
        }
    }
    u8::from(!labelled_v2)
}
