//! rope, attn_decode, attn_prefill.

use peregrine::gpu::ops::{self, AttnOutput, AttnScratch, LayerCache, Span};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::layout::HEAD_DIM;
use peregrine::reference;

use crate::kit::*;

/// Queries, keys and weights are f16, the output is rounded to f16. Measured: 2.5e-4.
const ATTENTION_TOLERANCE: f64 = 4e-4;
/// f16 rounding of the output. Measured: 2.1e-4.
const ROPE_TOLERANCE: f64 = 3e-4;
const CONTEXT: usize = 2048;

fn state(stream: &Stream, position: usize) -> DevBuf<u32> {
    let mut words = vec![0; 8];
    words[5] = position as u32;
    DevBuf::from_host(stream, "state", &words).unwrap()
}

/// Cache with `length` positions of data and NaN behind them.
fn cache(stream: &Stream, k: &[u16], v: &[u16]) -> LayerCache {
    let fill = |data: &[u16]| {
        let mut all = vec![NAN16; CONTEXT * HEAD_DIM];
        all[..data.len()].copy_from_slice(data);
        DevBuf::from_host(stream, "cache", &all).unwrap()
    };
    LayerCache { k: fill(k), v: fill(v) }
}

#[test]
fn rope_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let frequencies = reference::rope_frequencies(10000.0);
    let table: Vec<f32> = (0..CONTEXT)
        .flat_map(|p| frequencies.map(|f| p as f32 * f).into_iter().flat_map(|a| [a.cos(), a.sin()]))
        .collect();
    let table = DevBuf::from_host(&stream, "table", &table).unwrap();
    for (heads, m, position) in [(5, 1, 0), (71, 1, 2047), (71, 8, 63), (71, 65, 1000), (5, 300, 7)] {
        let qkv = Random::new(position as u64).halves(m * (heads + 2) * HEAD_DIM, 1.0);
        let mut qkv_gpu = DevBuf::from_host(&stream, "qkv", &qkv).unwrap();
        let mut cache = cache(&stream, &[], &[]);
        let state = state(&stream, position);
        ops::rope(
            &stream,
            &mut qkv_gpu,
            heads,
            &mut cache,
            &table,
            Span { state: &state, tokens: m, max_context: CONTEXT },
        )
        .unwrap();
        let mut want = to_f32(&qkv);
        let values = want
            .chunks((heads + 2) * HEAD_DIM)
            .flat_map(|row| row[(heads + 1) * HEAD_DIM..].to_vec())
            .collect::<Vec<_>>();
        reference::rope(&mut want, heads + 2, position, 10000.0); // the value's rotation is not used
        let got = to_f32(&qkv_gpu.download(&stream, 0, qkv.len()).unwrap());
        let part = |x: &[f32], first: usize, count: usize| -> Vec<f32> {
            x.chunks((heads + 2) * HEAD_DIM)
                .flat_map(|row| row[first * HEAD_DIM..(first + count) * HEAD_DIM].to_vec())
                .collect()
        };
        assert_close(
            &format!("queries {heads} m {m}"),
            &part(&got, 0, heads),
            &part(&want, 0, heads),
            ROPE_TOLERANCE,
        );
        let k = to_f32(&cache.k.download(&stream, position * HEAD_DIM, m * HEAD_DIM).unwrap());
        assert_close(&format!("key {heads} m {m}"), &k, &part(&want, heads, 1), ROPE_TOLERANCE);
        assert_eq!(to_f32(&cache.v.download(&stream, position * HEAD_DIM, m * HEAD_DIM).unwrap()), values);
        let all = cache.k.download(&stream, 0, CONTEXT * HEAD_DIM).unwrap();
        let untouched = all
            .iter()
            .enumerate()
            .all(|(i, &h)| (position..position + m).contains(&(i / HEAD_DIM)) || h == NAN16);
        assert!(untouched, "wrote outside the positions");
    }
}

struct Case {
    heads: usize,
    m: usize,
    position: usize,
}

fn check(
    stream: &Stream,
    name: &str,
    case: &Case,
    run: impl Fn(&DevBuf<u16>, &LayerCache, Span<'_>, AttnOutput<'_>),
) {
    let Case { heads, m, position } = *case;
    let mut random = Random::new((position * 100 + m) as u64);
    let qkv = random.halves(m * (heads + 2) * HEAD_DIM, 1.5);
    let (k, v) =
        (random.halves((position + m) * HEAD_DIM, 1.5), random.halves((position + m) * HEAD_DIM, 1.0));
    let q: Vec<f32> =
        qkv.chunks((heads + 2) * HEAD_DIM).flat_map(|row| to_f32(&row[..heads * HEAD_DIM])).collect();
    let want = reference::attention(&q, &to_f32(&k), &to_f32(&v), heads, position);
    let (first, stride) = (32, heads * HEAD_DIM + 96);
    let (qkv, cache, state) =
        (DevBuf::from_host(stream, "qkv", &qkv).unwrap(), cache(stream, &k, &v), state(stream, position));
    let once = || {
        let mut out = nan16(stream, first + m * stride);
        let span = Span { state: &state, tokens: m, max_context: CONTEXT };
        run(&qkv, &cache, span, AttnOutput { out: &mut out, first, stride });
        out.download(stream, 0, first + m * stride).unwrap()
    };
    let all = once();
    assert!(all == once(), "{name}: second run differs");
    let got: Vec<f32> = (0..m)
        .flat_map(|t| to_f32(&all[first + t * stride..first + t * stride + heads * HEAD_DIM]))
        .collect();
    assert_close(
        &format!("{name} heads {heads} m {m} position {position}"),
        &got,
        &want,
        ATTENTION_TOLERANCE,
    );
    let outside = (0..all.len()).filter(|i| *i < first || (i - first) % stride >= heads * HEAD_DIM);
    assert!(outside.into_iter().all(|i| all[i] == NAN16), "{name}: wrote outside its values");
}

#[test]
fn attn_decode_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let scratch = |heads| std::cell::RefCell::new(AttnScratch::new(&stream, heads, CONTEXT).unwrap());
    let (small, large) = (scratch(5), scratch(71));
    for position in [0, 1, 62, 63, 64, 65, 127, 191, 192, 255, 256, 257, 511, 1000, 2046, 2047] {
        for (heads, m) in [(5, 1), (71, 1), (71, 2), (5, 8), (71, 8)] {
            if position + m > CONTEXT {
                continue;
            }
            let scratch = if heads == 5 { &small } else { &large };
            check(&stream, "attn_decode", &Case { heads, m, position }, |qkv, cache, span, out| {
                ops::attn_decode(&stream, qkv, heads, cache, span, &mut scratch.borrow_mut(), out).unwrap();
            });
        }
    }
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
        (5, 2048, 0),
        (5, 17, 2031),
    ] {
        check(&stream, "attn_prefill", &Case { heads, m, position }, |qkv, cache, span, out| {
            ops::attn_prefill(&stream, qkv, heads, cache, span, out).unwrap();
        });
    }
}
