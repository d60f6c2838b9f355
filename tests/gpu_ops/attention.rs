//! rope, attn_prefill.

use peregrine::gpu::ops::{self, AttnOutput, LayerCache, StepTokens};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::lab::kit::rope_table;
use peregrine::lab::{CONTEXT, THETA};
use peregrine::layout::HEAD_DIM;
use peregrine::reference;

use crate::kit::*;

/// Queries, keys and weights are f16, the output is rounded to f16. Measured: 2.3e-4.
const ATTENTION_TOLERANCE: f64 = 4e-4;
/// f16 rounding of the output. Measured: 2.1e-4, 2.6e-4 for the 64 values of a single key.
const ROPE_TOLERANCE: f64 = 3e-4;

/// A token of a call: its slot and position.
pub type Place = (usize, usize);

/// The words of a call's tokens; those of a slot must follow each other.
pub fn words(places: &[Place]) -> Vec<u32> {
    let first = |slot| places.iter().position(|p| p.0 == slot).unwrap();
    places.iter().flat_map(|&(slot, at)| [0, at as u32, slot as u32, first(slot) as u32]).collect()
}

/// `count` tokens of a slot from `position` on.
pub fn run_of(slot: usize, position: usize, count: usize) -> Vec<Place> {
    (position..position + count).map(|p| (slot, p)).collect()
}

/// Cache whose slots begin with `rows` and are NaN behind them.
pub fn cache(stream: &Stream, rows: &[(Vec<u16>, Vec<u16>)]) -> LayerCache {
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

pub fn download(stream: &Stream, buffer: &DevBuf<u16>) -> Vec<u16> {
    buffer.download(stream, 0, buffer.len()).unwrap()
}

/// Heads `first ..` of each row of `x [.., heads + 2, 64]`.
pub fn part(x: &[f32], heads: usize, first: usize, count: usize) -> Vec<f32> {
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
        let output = AttnOutput { out: &mut out, first: 0, stride, planes: false, awaited: false };
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
        let output = AttnOutput { out: &mut out, first, stride, planes: false, awaited: false };
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
