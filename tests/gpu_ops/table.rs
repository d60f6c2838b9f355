//! table_repack, table_pack, embed, head.

use peregrine::checkpoint::{FloatTensor, FloatType};
use peregrine::gpu::ops::{self, StepTokens, Table};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::{reference, repack};

use crate::kit::*;

/// f32 sums of exact products. Measured: 1.6e-7.
const F32_TOLERANCE: f64 = 4e-7;
/// Of more than 8 tokens a row of Hopper's `head` is one chain of the tensor core, as in `gptq_batch`, which adds up to this for 16 inputs:
/// `BATCH_TOLERANCE` in matmul.rs says where it comes from. Measured: half of it, 5.4e-6 over 4544 inputs, 4.1e-7 over 320. Elsewhere there
/// are no chains: 1.6e-7.
const CHAIN_TOLERANCE: f64 = 2.0 / 3.0 / (1 << 24) as f64;

fn head_tolerance(m: usize, hidden: usize) -> f64 {
    let chain = m > ops::GEMV_TOKENS && cfg!(peregrine_sm90);
    F32_TOLERANCE + if chain { (hidden / 16) as f64 * CHAIN_TOLERANCE } else { 0.0 }
}

/// Makes the copy that `head` reads for more than 8 tokens.
fn lay_near(stream: &Stream, table: &Table) {
    table.lay_near(stream).unwrap();
    // There is one where L2 has sides and the kernel is Hopper's, with a block on either: else bits are compared with their own.
    let wanted = stream.sides().is_some() && cfg!(peregrine_sm90) && table.vocab >= 32;
    assert_eq!(table.bytes() > table.units.bytes(), wanted, "[{}, {}]: a copy", table.vocab, table.hidden);
}

/// Halves of eight significant bits at most, all of them below 1/4.
fn eight_bits(mut halves: Vec<u16>) -> Vec<u16> {
    for (i, half) in halves.iter_mut().enumerate() {
        // Subnormal ones too: of these the lowest bits count where they are the eight lowest.
        *half = if i % 17 == 0 { *half & 0x80ff } else { *half & !7 };
    }
    halves
}

fn table(stream: &Stream, rows: &[u16], hidden: usize) -> Table {
    let vocab = rows.len() / hidden;
    let bytes: Vec<u8> = rows.iter().flat_map(|h| h.to_le_bytes()).collect();
    let raw = DevBuf::from_host(stream, "raw", &bytes).unwrap();
    let mut units = nan16(stream, rows.len());
    ops::table_repack(stream, &raw, vocab, hidden, &mut units, 0).unwrap();
    Table::new(units, vocab, hidden, false)
}

#[test]
fn table_repack_and_embed_match_reference() {
    let Some((_, stream)) = gpu() else { return };
    for (vocab, hidden) in [(16, 64), (512, 320), (1024, 4544)] {
        let rows = Random::new(8).halves(vocab * hidden, 1.0);
        let table = table(&stream, &rows, hidden);
        let got = table.units.download(&stream, 0, vocab * hidden).unwrap();
        assert!(got == repack::table_repack(&rows, hidden), "[{vocab}, {hidden}]");
        embed_matches_reference(&stream, &table, &rows);
    }
}

/// Packed, a table gives the same rows as before, and the same logits bit for bit.
#[test]
fn table_pack_matches_reference_and_loses_nothing() {
    let Some((_, stream)) = gpu() else { return };
    for (vocab, hidden) in [(16, 64), (512, 320), (1024, 4544)] {
        let mut rows = eight_bits(Random::new(8).halves(vocab * hidden, 0.02));
        // The largest, the smallest of f16's normal numbers, the smallest of all, a negative zero.
        let edges = [0x33f8, 0xb3f8, 0x0400, 0x8400, 0x0001, 0x8001, 0x8000, 0x00ff, 0x01fe, 0x03fc];
        rows[..edges.len()].copy_from_slice(&edges);
        let table = table(&stream, &rows, hidden);
        let packed = ops::table_pack(&stream, &table).unwrap().expect("all values fit");
        let got = packed.units.download(&stream, 0, vocab * hidden / 4 * 3).unwrap();
        let want = repack::table_pack(&repack::table_repack(&rows, hidden)).expect("all values fit");
        assert!(got == want, "[{vocab}, {hidden}]");
        embed_matches_reference(&stream, &packed, &rows);
        let by_copy = ops::table_pack(&stream, &table).unwrap().expect("all values fit");
        lay_near(&stream, &by_copy);
        for m in [1, 7, 8, 9, 16, 17, 32, 33, 64] {
            let x = Random::new(m as u64).halves(m * hidden, 1.0);
            let x = DevBuf::from_host(&stream, "x", &x).unwrap();
            let head = |table| {
                let mut logits = nan32(&stream, m * vocab);
                ops::head(&stream, table, &x, 0, m, &mut logits, 0).unwrap();
                logits.download(&stream, 0, m * vocab).unwrap()
            };
            let want = head(&table);
            assert!(head(&packed) == want, "[{vocab}, {hidden}] m {m}");
            assert!(head(&by_copy) == want, "[{vocab}, {hidden}] m {m}, by the copy");
        }
    }
}

/// One value that does not fit, wherever it is, and the table stays as it is.
#[test]
fn table_pack_refuses_what_would_lose_bits() {
    let Some((_, stream)) = gpu() else { return };
    let (vocab, hidden) = (32, 320);
    let rows = eight_bits(Random::new(8).halves(vocab * hidden, 0.02));
    // Nine bits, a quarter, nine bits below the normal numbers, the smallest odd one of nine bits, infinity, NaN.
    for (i, value) in [0x2c04, 0x3400, 0xb400, 0x03fe, 0x0101, 0x7c00, 0x7e00].into_iter().enumerate() {
        let mut rows = rows.clone();
        rows[(i * 4021 + 5) % (vocab * hidden)] = value;
        assert!(ops::table_pack(&stream, &table(&stream, &rows, hidden)).unwrap().is_none(), "{value:#x}");
        assert!(repack::table_pack(&repack::table_repack(&rows, hidden)).is_none(), "{value:#x}");
    }
}

fn embed_matches_reference(stream: &Stream, table: &Table, rows: &[u16]) {
    let &Table { vocab, hidden, .. } = table;
    let ids: Vec<u32> = [0, 1, 7, 8, 15, vocab as u32 - 1].into();
    let bytes: Vec<u8> = rows.iter().flat_map(|h| h.to_le_bytes()).collect();
    let tensor = FloatTensor { dtype: FloatType::F16, shape: [vocab, hidden], bytes: &bytes };
    // Behind a step's header; positions and slots are not embed's business.
    let words = [vec![0; 4], ops::step_token_words(&ids, 100, 3).unwrap()].concat();
    let step = DevBuf::from_host(stream, "step", &words).unwrap();
    let mut x = nan32(stream, ids.len() * hidden);
    ops::embed(stream, table, StepTokens::step(&step, ids.len()), &mut x).unwrap();
    assert_eq!(x.download(stream, 0, ids.len() * hidden).unwrap(), reference::embed(&tensor, &ids));

    // An id that is none reads as row 0.
    let words = ops::step_token_words(&[u32::MAX, vocab as u32], 0, 0).unwrap();
    let list = DevBuf::from_host(stream, "list", &words).unwrap();
    ops::embed(stream, table, StepTokens::list(&list, 2), &mut x).unwrap();
    assert_eq!(x.download(stream, 0, 2 * hidden).unwrap(), reference::embed(&tensor, &[0, 0]));
}

#[test]
fn head_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    // The last one has more row tiles than blocks of a large GPU multiply at once.
    for (vocab, hidden) in [(16, 64), (512, 320), (4096, 4544), (65024, 128), (70400, 192)] {
        let rows = Random::new(9).halves(vocab * hidden, (hidden as f32).sqrt().recip());
        let table = table(&stream, &rows, hidden);
        let bytes: Vec<u8> = rows.iter().flat_map(|h| h.to_le_bytes()).collect();
        let tensor = FloatTensor { dtype: FloatType::F16, shape: [vocab, hidden], bytes: &bytes };
        let by_copy = self::table(&stream, &rows, hidden);
        lay_near(&stream, &by_copy);
        for m in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64] {
            let x = Random::new(10 + m as u64).halves((m + 3) * hidden, 1.0);
            let want = reference::head(&to_f32(&x[3 * hidden..]), &tensor);
            let x = DevBuf::from_host(&stream, "x", &x).unwrap();
            let run = |table| {
                let mut logits = nan32(&stream, m * vocab);
                ops::head(&stream, table, &x, 3, m, &mut logits, 0).unwrap();
                logits.download(&stream, 0, m * vocab).unwrap()
            };
            let got = run(&table);
            let tolerance = head_tolerance(m, hidden);
            assert_close(&format!("head [{vocab}, {hidden}] m {m}"), &got, &want, tolerance);
            assert!(got == run(&table), "second run differs");
            // Thrice, so that words by which blocks take shares are used again.
            for _ in 0..3 {
                assert!(got == run(&by_copy), "head [{vocab}, {hidden}] m {m}, by the copy");
            }
        }
    }
}
