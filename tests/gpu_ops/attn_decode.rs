//! attn_decode.

use peregrine::gpu::ops::{self, AttnOutput, AttnScratch, StepTokens};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::lab::kit::rope_table;
use peregrine::lab::{CONTEXT, THETA};
use peregrine::layout::{HEAD_DIM, f32_to_f16};
use peregrine::{planes, reference};

use crate::attention::{Place, cache, download, part, run_of, words};
use crate::kit::*;

/// Rotation and attention in one, queries and keys rounded to f16 between. Measured: 2.4e-4.
const DECODE_TOLERANCE: f64 = 4e-4;
/// The same without the output's rounding to f16: it is bytes, see planes.rs. Measured: 9.5e-5.
const PLANES_TOLERANCE: f64 = 1.5e-4;
/// That rounding: 2.8e-4 at most. Measured: 2.1e-4.
const F16_TOLERANCE: f64 = 3e-4;

/// The sequences a call's tokens belong to: for each slot its values of every position, so that any run of tokens can be cut
/// out of it.
struct Sequences {
    heads: usize,
    /// A slot's `[length, heads + 2, 64]`, not rotated.
    qkv: Vec<Vec<u16>>,
    /// Rotated keys as `rope` leaves them, and values: `[length, 64]`.
    cached: Vec<(Vec<u16>, Vec<u16>)>,
}

impl Sequences {
    /// `lengths[slot]` positions each.
    fn new(stream: &Stream, table: &DevBuf<f32>, heads: usize, lengths: &[usize]) -> Sequences {
        let mut sequences = Sequences { heads, qkv: vec![], cached: vec![] };
        for (slot, &length) in lengths.iter().enumerate() {
            let mut random = Random::new((heads * 10000 + slot * 3000 + length) as u64);
            let qkv = random.halves(length * (heads + 2) * HEAD_DIM, 1.3);
            let mut cached = (vec![], vec![]);
            if length > 0 {
                let mut gpu = DevBuf::from_host(stream, "qkv", &qkv).unwrap();
                let mut cache = cache(stream, &[(vec![], vec![])]);
                let tokens = DevBuf::from_host(stream, "tokens", &words(&run_of(0, 0, length))).unwrap();
                let tokens = StepTokens::list(&tokens, length);
                ops::rope(stream, &mut gpu, heads, &mut cache, table, tokens).unwrap();
                cached.0 = cache.k.download(stream, 0, length * HEAD_DIM).unwrap();
                cached.1 = cache.v.download(stream, 0, length * HEAD_DIM).unwrap();
            }
            sequences.qkv.push(qkv);
            sequences.cached.push(cached);
        }
        sequences
    }

    fn row(&self, (slot, position): Place) -> &[u16] {
        let n = (self.heads + 2) * HEAD_DIM;
        &self.qkv[slot][position * n..][..n]
    }

    /// What attention must give for a token, by the reference alone.
    fn want(&self, (slot, position): Place) -> Vec<f32> {
        let n = (self.heads + 2) * HEAD_DIM;
        let mut rotated = to_f32(&self.qkv[slot][..(position + 1) * n]);
        let values = part(&rotated, self.heads, self.heads + 1, 1);
        reference::rope(&mut rotated, self.heads + 2, 0, THETA);
        // Rotated values are kept as f16: what the kernel computes with.
        let keys = round(&part(&rotated, self.heads, self.heads, 1));
        let query = round(&rotated[position * n..][..self.heads * HEAD_DIM]);
        reference::attention(&query, &keys, &values, self.heads, position)
    }

    /// Runs a call on a cache that holds what precedes its tokens; gives each token's output, and checks what it appended.
    fn run(
        &self,
        stream: &Stream,
        table: &DevBuf<f32>,
        scratch: &mut AttnScratch,
        places: &[Place],
    ) -> Vec<Vec<u16>> {
        self.run_within(CONTEXT, stream, table, scratch, places)
    }

    /// The same by what is there for positions that are all less than `reach`.
    fn run_within(
        &self,
        reach: usize,
        stream: &Stream,
        table: &DevBuf<f32>,
        scratch: &mut AttnScratch,
        places: &[Place],
    ) -> Vec<Vec<u16>> {
        let (m, width) = (places.len(), self.heads * HEAD_DIM);
        let (first, stride) = (32, width + 96);
        let mut out = nan16(stream, first + m * stride);
        let output = AttnOutput { out: &mut out, first, stride, planes: false, awaited: false };
        self.call(reach, stream, table, scratch, places, output);
        let all = download(stream, &out);
        let outside = (0..all.len()).filter(|i| *i < first || (i - first) % stride >= width);
        assert!(outside.into_iter().all(|i| all[i] == NAN16), "wrote outside its values");
        (0..m).map(|t| all[first + t * stride..][..width].to_vec()).collect()
    }

    /// As planes of bytes, behind two units of somebody else's.
    fn run_as_planes(
        &self,
        stream: &Stream,
        table: &DevBuf<f32>,
        scratch: &mut AttnScratch,
        places: &[Place],
    ) -> Vec<Vec<f32>> {
        let (m, width, first) = (places.len(), self.heads * HEAD_DIM, 128);
        let stride = first + width + 64;
        let mut out = DevBuf::from_host(stream, "planes", &vec![u16::MAX; planes::len(stride)]).unwrap();
        let output = AttnOutput { out: &mut out, first, stride, planes: true, awaited: false };
        self.call(CONTEXT, stream, table, scratch, places, output);
        let rows = planes::decode(&download(stream, &out), stride, m);
        let untouched = |row: &[f32]| row.iter().all(|v| v.is_nan());
        rows.chunks(stride)
            .map(|row| {
                assert!(
                    untouched(&row[..first]) && untouched(&row[first + width..]),
                    "wrote outside its values"
                );
                row[first..first + width].to_vec()
            })
            .collect()
    }

    /// A call on a cache that holds what precedes its tokens, and a look at what it appended.
    fn call(
        &self,
        reach: usize,
        stream: &Stream,
        table: &DevBuf<f32>,
        scratch: &mut AttnScratch,
        places: &[Place],
        output: AttnOutput<'_>,
    ) {
        let m = places.len();
        let before: Vec<_> = (0..self.qkv.len())
            .map(|slot| {
                let length = places.iter().find(|p| p.0 == slot).map_or(0, |p| p.1) * HEAD_DIM;
                let (k, v) = &self.cached[slot];
                (k[..length].to_vec(), v[..length].to_vec())
            })
            .collect();
        let mut cache = cache(stream, &before);
        let rows: Vec<u16> = places.iter().flat_map(|&p| self.row(p).to_vec()).collect();
        let qkv = DevBuf::from_host(stream, "qkv", &rows).unwrap();
        // As in a `Step`, behind its header.
        let mut step = vec![m as u32, 0, 0, 0];
        step.extend(words(places));
        let step = DevBuf::from_host(stream, "step", &step).unwrap();
        let tokens = StepTokens::step(&step, m).within(reach);
        ops::attn_decode(stream, &qkv, &mut cache, table, tokens, scratch, output).unwrap();

        let after: Vec<_> = (0..self.qkv.len())
            .map(|slot| {
                let length =
                    places.iter().filter(|p| p.0 == slot).map(|p| p.1 + 1).max().unwrap_or(0) * HEAD_DIM;
                let (k, v) = &self.cached[slot];
                (k[..length].to_vec(), v[..length].to_vec())
            })
            .collect();
        let expected = self::cache(stream, &after);
        assert!(download(stream, &cache.k) == download(stream, &expected.k), "keys appended for {places:?}");
        assert!(
            download(stream, &cache.v) == download(stream, &expected.v),
            "values appended for {places:?}"
        );
    }
}

fn round(x: &[f32]) -> Vec<f32> {
    to_f32(&x.iter().map(|&v| f32_to_f16(v)).collect::<Vec<_>>())
}

const EDGES: [usize; 17] = [0, 1, 7, 31, 32, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 2046, 2047];

#[test]
fn attn_decode_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let table = rope_table(&stream).unwrap();
    for heads in [5, 71] {
        let sequences = Sequences::new(&stream, &table, heads, &[CONTEXT]);
        let mut scratch = AttnScratch::new(&stream, heads, CONTEXT, ops::STEP_TOKENS).unwrap();
        let (mut got, mut want) = (vec![], vec![]);
        for position in EDGES {
            let place = [(0, position)];
            let out = sequences.run(&stream, &table, &mut scratch, &place);
            assert!(out == sequences.run(&stream, &table, &mut scratch, &place), "second run differs");
            let (out, reference) = (to_f32(&out[0]), sequences.want(place[0]));
            assert_close(
                &format!("attn_decode heads {heads} position {position}"),
                &out,
                &reference,
                DECODE_TOLERANCE,
            );
            got.extend(out);
            want.extend(reference);
        }
        assert_close(&format!("attn_decode heads {heads}, all"), &got, &want, DECODE_TOLERANCE);
    }
}

/// A value is off by the reference's own rounding of keys and weights, and half a step.
#[test]
fn attn_decode_as_planes_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let table = rope_table(&stream).unwrap();
    let lengths = [CONTEXT, 130, 64, 1, 400, 257, 2, 1025, 5];
    for heads in [5, 71] {
        let sequences = Sequences::new(&stream, &table, heads, &lengths);
        let mut scratch = AttnScratch::new(&stream, heads, CONTEXT, ops::STEP_TOKENS).unwrap();
        let last: Vec<Place> = lengths.iter().enumerate().map(|(slot, &length)| (slot, length - 1)).collect();
        for call in [last, run_of(0, 250, 16), run_of(7, 1000, 1)] {
            let planes = sequences.run_as_planes(&stream, &table, &mut scratch, &call);
            assert!(
                planes == sequences.run_as_planes(&stream, &table, &mut scratch, &call),
                "second run differs"
            );
            for (row, &place) in planes.iter().zip(&call) {
                let what = format!("attn_decode as planes heads {heads} token {place:?}");
                assert_close(&what, row, &sequences.want(place), PLANES_TOLERANCE);
            }
            // What is rounded to f16 otherwise.
            let rows = sequences.run(&stream, &table, &mut scratch, &call);
            let rows: Vec<f32> = rows.iter().flat_map(|row| to_f32(row)).collect();
            assert_close(
                &format!("attn_decode as planes and as f16, heads {heads}"),
                &planes.concat(),
                &rows,
                F16_TOLERANCE,
            );
        }
    }
}

/// A token's result is its own: the same bits alone, among tokens of other slots, and behind its predecessors in one call.
#[test]
fn attn_decode_does_not_mix_tokens() {
    let Some((_, stream)) = gpu() else { return };
    let table = rope_table(&stream).unwrap();
    let lengths = [CONTEXT, 130, 64, 1, 400, 257, 2, 1025];
    for heads in [5, 71] {
        let sequences = Sequences::new(&stream, &table, heads, &lengths);
        let mut scratch = AttnScratch::new(&stream, heads, CONTEXT, ops::STEP_TOKENS).unwrap();
        let last: Vec<Place> = lengths.iter().enumerate().map(|(slot, &length)| (slot, length - 1)).collect();
        let mut calls = vec![
            last.clone(),                                                                            // a batch
            [5, 0, 4].map(|slot| last[slot]).to_vec(), // in another order, some slots idle
            [run_of(4, 250, 8), run_of(0, 2000, 40), run_of(7, 100, 1), run_of(2, 49, 15)].concat(), // a mixture: 64 tokens
            run_of(0, 0, 64),
            run_of(0, 1, 63),
            run_of(0, CONTEXT - 64, 64),
        ];
        // Speculation: eight in a row, two, seven, around the edges of rounds and chunks.
        for position in [0, 1, 25, 57, 60, 63, 64, 121, 124, 127, 128, 250, 255, 256, CONTEXT - 8] {
            calls.push(run_of(0, position, 8));
        }
        calls.extend([run_of(0, 127, 2), run_of(0, 122, 7), run_of(1, 123, 7)]);
        for call in calls {
            let together = sequences.run(&stream, &table, &mut scratch, &call);
            assert!(together == sequences.run(&stream, &table, &mut scratch, &call), "second run differs");
            // All of a short call, some of a long one.
            for i in (0..call.len()).step_by(call.len().div_ceil(8)).chain([call.len() - 1]) {
                let alone = sequences.run(&stream, &table, &mut scratch, &call[i..=i]);
                assert!(
                    together[i] == alone[0],
                    "heads {heads}: token {i}, {:?}, of {call:?} differs",
                    call[i]
                );
            }
            let (i, place) = (call.len() - 1, call[call.len() - 1]);
            assert_close(
                &format!("attn_decode heads {heads} m {} token {place:?}", call.len()),
                &to_f32(&together[i]),
                &sequences.want(place),
                DECODE_TOLERANCE,
            );
        }
    }
}

/// Of tokens that are known to have short contexts, four warps have a head tile's keys, or two, or one: as many as there is room for. Where
/// that is four, as for all 5 heads, the bits are those of a call that knows nothing of contexts.
#[test]
fn attn_decode_of_short_contexts_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let table = rope_table(&stream).unwrap();
    let (short, lengths) = (ops::ATTN_SHORT, [ops::ATTN_SHORT, 130, 64, 1, 400, 257, 2, 33]);
    for heads in [5, 71] {
        let sequences = Sequences::new(&stream, &table, heads, &lengths);
        let mut scratch = AttnScratch::new(&stream, heads, CONTEXT, ops::STEP_TOKENS).unwrap();
        let last: Vec<Place> = lengths.iter().enumerate().map(|(slot, &length)| (slot, length - 1)).collect();
        let mixed =
            [run_of(0, 480, 32), run_of(1, 122, 8), run_of(4, 392, 8), run_of(5, 241, 15), run_of(3, 0, 1)];
        let calls = [
            last,
            mixed.concat(),
            [mixed[1].clone(), mixed[3].clone(), run_of(2, 60, 4)].concat(), // 27 tokens
            run_of(0, 0, 64),
            run_of(0, 1, 53),
            run_of(0, short - 64, 64),
            run_of(0, short - 52, 52),
            mixed[0].clone(),
        ];
        for call in calls {
            let out = sequences.run_within(short, &stream, &table, &mut scratch, &call);
            let again = sequences.run_within(short, &stream, &table, &mut scratch, &call);
            assert!(out == again, "second run differs");
            let long = sequences.run(&stream, &table, &mut scratch, &call);
            assert!(out == long || (heads > 5 && call.len() > 26), "the same kernel, other bits: {call:?}");
            for (place, out) in call.iter().zip(&out) {
                let what = format!("heads {heads} m {} token {place:?} of short contexts", call.len());
                assert_close(&what, &to_f32(out), &sequences.want(*place), DECODE_TOLERANCE);
            }
        }
    }
}

/// A `reach` is a hint: where positions are beyond it, teams of two warps and of one have all the same keys, in more time.
#[test]
fn attn_decode_beyond_its_reach_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let table = rope_table(&stream).unwrap();
    let (heads, length) = (71, ops::ATTN_SHORT + 300);
    let sequences = Sequences::new(&stream, &table, heads, &[length]);
    let mut scratch = AttnScratch::new(&stream, heads, CONTEXT, ops::STEP_TOKENS).unwrap();
    for m in [27, 64] {
        for reach in [1, ops::ATTN_SHORT] {
            let call = run_of(0, length - m, m);
            let out = sequences.run_within(reach, &stream, &table, &mut scratch, &call);
            for (place, out) in call.iter().zip(&out) {
                let what = format!("m {m} token {place:?} beyond {reach}");
                assert_close(&what, &to_f32(out), &sequences.want(*place), DECODE_TOLERANCE);
            }
        }
    }
}

/// Positions and slots beyond the cache, as only damaged device memory has them, must not leave it.
#[test]
fn attn_decode_clamps_its_tokens() {
    let Some((_, stream)) = gpu() else { return };
    let (heads, table) = (5, rope_table(&stream).unwrap());
    let sequences = Sequences::new(&stream, &table, heads, &[CONTEXT, CONTEXT]);
    let mut scratch = AttnScratch::new(&stream, heads, CONTEXT, 2).unwrap();
    let mut cache = cache(&stream, &sequences.cached);
    let rows = [sequences.row((1, CONTEXT - 2)), sequences.row((1, CONTEXT - 1))].concat();
    let qkv = DevBuf::from_host(&stream, "qkv", &rows).unwrap();
    let wild = [0, u32::MAX, u32::MAX, u32::MAX, 0, u32::MAX, 1, 0];
    let tokens = DevBuf::from_host(&stream, "tokens", &wild).unwrap();
    let width = heads * HEAD_DIM;
    let mut out = nan16(&stream, 2 * width);
    let output = AttnOutput { out: &mut out, first: 0, stride: width, planes: false, awaited: false };
    ops::attn_decode(&stream, &qkv, &mut cache, &table, StepTokens::list(&tokens, 2), &mut scratch, output)
        .unwrap();
    let right = sequences.run(&stream, &table, &mut scratch, &run_of(1, CONTEXT - 2, 2));
    assert!(download(&stream, &out)[width..] == right[1], "the second token stands where it should");
}
