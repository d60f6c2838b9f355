//! rope, attn_decode, attn_prefill.

use peregrine::gpu::ops::{self, AttnOutput, AttnScratch, LayerCache, StepTokens};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::lab::kit::rope_table;
use peregrine::lab::{CONTEXT, THETA};
use peregrine::layout::{HEAD_DIM, f32_to_f16};
use peregrine::reference;

use crate::kit::*;

/// Queries, keys and weights are f16, the output is rounded to f16. Measured: 2.3e-4.
const ATTENTION_TOLERANCE: f64 = 4e-4;
/// f16 rounding of the output. Measured: 2.1e-4, 2.6e-4 for the 64 values of a single key.
const ROPE_TOLERANCE: f64 = 3e-4;
/// Rotation and attention in one, queries and keys rounded to f16 between. Measured: 2.4e-4.
const DECODE_TOLERANCE: f64 = 4e-4;

/// A token of a call: its slot and position.
type Place = (usize, usize);

/// The words of a call's tokens; those of a slot must follow each other.
fn words(places: &[Place]) -> Vec<u32> {
    let first = |slot| places.iter().position(|p| p.0 == slot).unwrap();
    places.iter().flat_map(|&(slot, at)| [0, at as u32, slot as u32, first(slot) as u32]).collect()
}

/// `count` tokens of a slot from `position` on.
fn run_of(slot: usize, position: usize, count: usize) -> Vec<Place> {
    (position..position + count).map(|p| (slot, p)).collect()
}

/// Cache whose slots begin with `rows` and are NaN behind them.
fn cache(stream: &Stream, rows: &[(Vec<u16>, Vec<u16>)]) -> LayerCache {
    let mut cache = LayerCache::new(stream, rows.len(), CONTEXT).unwrap();
    let fill = |buffer: &mut DevBuf<u16>, of: &dyn Fn(usize) -> Vec<u16>| {
        let mut all = vec![NAN16; rows.len() * CONTEXT * HEAD_DIM];
        for slot in 0..rows.len() {
            let data = of(slot);
            all[slot * CONTEXT * HEAD_DIM..][..data.len()].copy_from_slice(&data);
        }
        buffer.upload(stream, 0, &all).unwrap();
    };
    fill(&mut cache.k, &|slot| rows[slot].0.clone());
    fill(&mut cache.v, &|slot| rows[slot].1.clone());
    cache
}

fn download(stream: &Stream, buffer: &DevBuf<u16>) -> Vec<u16> {
    buffer.download(stream, 0, buffer.len()).unwrap()
}

/// Heads `first ..` of each row of `x [.., heads + 2, 64]`.
fn part(x: &[f32], heads: usize, first: usize, count: usize) -> Vec<f32> {
    x.chunks((heads + 2) * HEAD_DIM)
        .flat_map(|row| row[first * HEAD_DIM..(first + count) * HEAD_DIM].to_vec())
        .collect()
}

#[test]
fn rope_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let table = rope_table(&stream).unwrap();
    for (heads, m, position, slot) in
        [(5, 1, 0, 0), (71, 1, 2047, 1), (71, 8, 63, 1), (71, 65, 1000, 0), (5, 300, 7, 1)]
    {
        let qkv = Random::new(position as u64).halves(m * (heads + 2) * HEAD_DIM, 1.0);
        let mut qkv_gpu = DevBuf::from_host(&stream, "qkv", &qkv).unwrap();
        let mut cache = cache(&stream, &[(vec![], vec![]), (vec![], vec![])]);
        let tokens = DevBuf::from_host(&stream, "tokens", &words(&run_of(slot, position, m))).unwrap();
        let tokens = StepTokens::list(&tokens, m);
        ops::rope(&stream, &mut qkv_gpu, heads, &mut cache, &table, tokens).unwrap();
        let mut want = to_f32(&qkv);
        let values = part(&want, heads, heads + 1, 1);
        reference::rope(&mut want, heads + 2, position, THETA); // the value's rotation is not used
        let got = to_f32(&download(&stream, &qkv_gpu));
        assert_close(
            &format!("queries {heads} m {m}"),
            &part(&got, heads, 0, heads),
            &part(&want, heads, 0, heads),
            ROPE_TOLERANCE,
        );
        let at = (slot * CONTEXT + position) * HEAD_DIM;
        let k = to_f32(&cache.k.download(&stream, at, m * HEAD_DIM).unwrap());
        assert_close(&format!("key {heads} m {m}"), &k, &part(&want, heads, heads, 1), ROPE_TOLERANCE);
        assert_eq!(to_f32(&cache.v.download(&stream, at, m * HEAD_DIM).unwrap()), values);
        for all in [download(&stream, &cache.k), download(&stream, &cache.v)] {
            let mut rows = all.chunks(HEAD_DIM).enumerate();
            let ours = slot * CONTEXT + position..slot * CONTEXT + position + m;
            assert!(
                rows.all(|(i, row)| ours.contains(&i) || row.iter().all(|&h| h == NAN16)),
                "wrote elsewhere"
            );
        }
    }
}

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
        let mut out = nan16(stream, first + m * stride);
        let output = AttnOutput { out: &mut out, first, stride, awaited: false };
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
        let all = download(stream, &out);
        let outside = (0..all.len()).filter(|i| *i < first || (i - first) % stride >= width);
        assert!(outside.into_iter().all(|i| all[i] == NAN16), "wrote outside its values");
        (0..m).map(|t| all[first + t * stride..][..width].to_vec()).collect()
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
    let output = AttnOutput { out: &mut out, first: 0, stride: width, awaited: false };
    ops::attn_decode(&stream, &qkv, &mut cache, &table, StepTokens::list(&tokens, 2), &mut scratch, output)
        .unwrap();
    let right = sequences.run(&stream, &table, &mut scratch, &run_of(1, CONTEXT - 2, 2));
    assert!(download(&stream, &out)[width..] == right[1], "the second token stands where it should");
}

struct Case {
    heads: usize,
    m: usize,
    position: usize,
}

#[test]
fn attn_prefill_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    for (heads, m, position) in [
        (5, 1, 0),
        (5, 9, 0),
        (71, 63, 0),
        (71, 64, 0),
        (71, 65, 0),
        (5, 63, 1),
        (5, 64, 64),
        (5, 65, 100),
        (71, 130, 1900),
        (71, 127, 0),
        (71, 237, 0), // the last of the narrow tiles of a GPU of 132 multiprocessors, the first of the wide ones
        (71, 238, 0),
        (71, 500, 0),
        (71, 250, 1790),
        (5, 2048, 0),
        (13, 2048, 0),
        (5, 17, 2031),
    ] {
        for slot in [0, 1] {
            check_prefill(&stream, &Case { heads, m, position }, slot);
        }
    }
}

/// A prompt in pieces is the prompt in one pass: the same bits where the pieces are cut into tiles as the whole is, which a token's
/// result does not depend on the place of; within rounding where a piece is so short that its tiles are narrower.
#[test]
fn attn_prefill_in_pieces_is_the_whole() {
    let Some((_, stream)) = gpu() else { return };
    let (heads, m) = (71, 1100);
    let mut random = Random::new(3);
    let qkv = random.halves(m * (heads + 2) * HEAD_DIM, 1.5);
    let (k, v) = (random.halves(m * HEAD_DIM, 1.5), random.halves(m * HEAD_DIM, 1.0));
    let (row, stride) = ((heads + 2) * HEAD_DIM, heads * HEAD_DIM);
    let run = |position: usize, count: usize| {
        // What comes behind the piece is not in the cache yet.
        let seen = (position + count) * HEAD_DIM;
        let cache = cache(&stream, &[(k[..seen].to_vec(), v[..seen].to_vec())]);
        let piece = DevBuf::from_host(&stream, "qkv", &qkv[position * row..][..count * row]).unwrap();
        let tokens = DevBuf::from_host(&stream, "tokens", &words(&run_of(0, position, count))).unwrap();
        let mut out = nan16(&stream, count * stride);
        let output = AttnOutput { out: &mut out, first: 0, stride, awaited: false };
        ops::attn_prefill(&stream, &piece, heads, &cache, StepTokens::list(&tokens, count), output).unwrap();
        download(&stream, &out)
    };
    let whole = run(0, m);
    for pieces in [vec![550, 550], vec![300, 257, 543], vec![239, 600, 261]] {
        let mut at = 0;
        for count in pieces {
            assert!(run(at, count) == whole[at * stride..][..count * stride], "{count} tokens at {at}");
            at += count;
        }
    }
    for (at, count) in [(0, 1), (0, 64), (63, 65), (1000, 100), (1099, 1)] {
        let got = to_f32(&run(at, count));
        let want = to_f32(&whole[at * stride..][..count * stride]);
        assert_close(&format!("attn_prefill {count} tokens at {at}"), &got, &want, ATTENTION_TOLERANCE);
    }
}

fn check_prefill(stream: &Stream, case: &Case, slot: usize) {
    let Case { heads, m, position } = *case;
    let mut random = Random::new((position * 100 + m) as u64);
    let qkv = random.halves(m * (heads + 2) * HEAD_DIM, 1.5);
    let (k, v) =
        (random.halves((position + m) * HEAD_DIM, 1.5), random.halves((position + m) * HEAD_DIM, 1.0));
    let q = part(&to_f32(&qkv), heads, 0, heads);
    let want = reference::attention(&q, &to_f32(&k), &to_f32(&v), heads, position);
    let (first, stride) = (32, heads * HEAD_DIM + 96);
    let mut rows = [(vec![], vec![]), (vec![], vec![])];
    rows[slot] = (k, v);
    let (qkv, cache) = (DevBuf::from_host(stream, "qkv", &qkv).unwrap(), cache(stream, &rows));
    let tokens = DevBuf::from_host(stream, "tokens", &words(&run_of(slot, position, m))).unwrap();
    let once = || {
        let mut out = nan16(stream, first + m * stride);
        let output = AttnOutput { out: &mut out, first, stride, awaited: false };
        ops::attn_prefill(stream, &qkv, heads, &cache, StepTokens::list(&tokens, m), output).unwrap();
        download(stream, &out)
    };
    let all = once();
    assert!(all == once(), "attn_prefill: second run differs");
    let got: Vec<f32> = (0..m)
        .flat_map(|t| to_f32(&all[first + t * stride..first + t * stride + heads * HEAD_DIM]))
        .collect();
    assert_close(
        &format!("attn_prefill heads {heads} m {m} position {position} slot {slot}"),
        &got,
        &want,
        ATTENTION_TOLERANCE,
    );
    let outside = (0..all.len()).filter(|i| *i < first || (i - first) % stride >= heads * HEAD_DIM);
    assert!(outside.into_iter().all(|i| all[i] == NAN16), "attn_prefill: wrote outside its values");
}
