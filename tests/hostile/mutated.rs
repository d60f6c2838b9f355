//! Random changes to good files: refused, or good to read.

use std::cell::Cell;
use std::fs;

use peregrine::Error;
use peregrine::checkpoint::Checkpoint;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::Value;

use crate::kit::{FILE, GOOD, open};
use crate::variants::{header, serialize, with_header, words};

/// A random change to a file.
#[derive(Debug, Clone)]
enum Mutation {
    Flip { at: prop::sample::Index, bit: u8 },
    Set { at: prop::sample::Index, byte: u8 },
    Truncate { at: prop::sample::Index },
    Insert { at: prop::sample::Index, bytes: Vec<u8> },
    Remove { at: prop::sample::Index, len: usize },
    Copy { from: prop::sample::Index, to: prop::sample::Index, len: usize },
}

fn mutation() -> impl Strategy<Value = Mutation> {
    use prop::sample::Index;
    // JSON's own bytes and digits more often than others: they lead further in.
    let bytes = || {
        prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(b"{}[]\",:0123456789-e.".to_vec())],
            1..20,
        )
    };
    prop_oneof![
        (any::<Index>(), 0u8..8).prop_map(|(at, bit)| Mutation::Flip { at, bit }),
        (any::<Index>(), bytes()).prop_map(|(at, bytes)| Mutation::Set { at, byte: bytes[0] }),
        any::<Index>().prop_map(|at| Mutation::Truncate { at }),
        (any::<Index>(), bytes()).prop_map(|(at, bytes)| Mutation::Insert { at, bytes }),
        (any::<Index>(), 1usize..200).prop_map(|(at, len)| Mutation::Remove { at, len }),
        (any::<Index>(), any::<Index>(), 1usize..200).prop_map(|(from, to, len)| Mutation::Copy {
            from,
            to,
            len
        }),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let reach = bytes.len();
    if reach == 0 {
        return;
    }
    match mutation {
        Mutation::Flip { at, bit } => bytes[at.index(reach)] ^= 1 << bit,
        Mutation::Set { at, byte } => bytes[at.index(reach)] = *byte,
        Mutation::Truncate { at } => bytes.truncate(at.index(reach)),
        Mutation::Insert { at, bytes: new } => {
            drop(bytes.splice(at.index(reach)..at.index(reach), new.iter().copied()))
        }
        Mutation::Remove { at, len } => {
            drop(bytes.drain(at.index(reach)..(at.index(reach) + len).min(reach)))
        }
        Mutation::Copy { from, to, len } => {
            let piece = bytes[from.index(reach)..(from.index(reach) + len).min(reach)].to_vec();
            // Over what is there: the lengths stay right, which leads further in.
            let to = to.index(reach - piece.len() + 1);
            bytes[to..to + piece.len()].copy_from_slice(&piece);
        }
    }
}

/// A checkpoint that is opened must hold up to being read: every view is used.
fn use_all_of(checkpoint: &Checkpoint) {
    let config = checkpoint.config();
    let mut sum = 0f32;
    for i in 0..config.num_layers {
        let layer = checkpoint.layer(i);
        for m in [&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h] {
            assert_eq!(m.qweight.len(), m.k * m.n / 2);
            assert_eq!(m.qzeros.len(), m.groups() * m.n / 2);
            assert_eq!(m.scales.len(), m.groups() * m.n);
            assert!(m.scales.to_f32().iter().all(|s| s.is_finite()));
            assert!(m.g_idx.is_none_or(|g| words(g).iter().all(|&g| (g as usize) < m.groups())));
        }
        sum += layer.input_layernorm.weight.get(config.hidden_size - 1);
    }
    sum += checkpoint.embedding().get(config.vocab_size * config.hidden_size - 1);
    assert!(sum.is_finite());
    let _ = peregrine::inspect::inspect(checkpoint, None).to_string();
}

/// Opens the good checkpoint with `file` mutated 400 times: it must be refused with status 4, or what is opened must
/// be good to read. `good` is what is mutated, and `file` makes the file of it.
fn survives(name: &str, good: &[u8], most_mutations: usize, file: impl Fn(Vec<u8>) -> Vec<u8>) {
    let dir = GOOD.write();
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() };
    let mutations = prop::collection::vec(mutation(), 1..=most_mutations);
    let opened = Cell::new(0);
    let result = TestRunner::new(config).run(&mutations, |mutations| {
        let mut bytes = good.to_vec();
        mutations.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        fs::write(dir.path().join(name), file(bytes)).unwrap();
        match open(dir.str()) {
            Ok(checkpoint) => {
                opened.set(opened.get() + 1);
                use_all_of(&checkpoint);
            }
            Err(Error::Model { .. }) => {}
            Err(other) => panic!("another kind of error: {other:?}"),
        }
        Ok(())
    });
    result.unwrap();
    println!("{name}: {} of 400 were still good", opened.get());
}

#[test]
fn mutated_files_are_survived() {
    survives(FILE, &serialize(GOOD.tensors.iter()), 8, |bytes| bytes);
}

/// The header's length is made right again, so that all mutations reach the JSON and what follows it.
#[test]
fn mutated_headers_are_survived() {
    let data: Vec<u8> = GOOD.tensors.values().flat_map(|t| t.bytes.iter().copied()).collect();
    let header = Value::Object(header(GOOD.tensors.iter())).to_string().into_bytes();
    survives(FILE, &header, 2, |header| [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat());
}

/// Everything but the codes, in which any bits are valid: the bytes of the small tensors.
#[test]
fn mutated_numbers_are_survived() {
    let header = Value::Object(header(GOOD.tensors.iter())).to_string();
    let small: Vec<u8> =
        GOOD.tensors.iter().filter(|(n, _)| n.contains("g_idx")).flat_map(|(_, t)| t.bytes.clone()).collect();
    survives(FILE, &small, 4, |bytes| {
        let mut rest = bytes.into_iter().chain(std::iter::repeat(0));
        let data = GOOD.tensors.iter().flat_map(|(name, t)| match name.contains("g_idx") {
            true => rest.by_ref().take(t.bytes.len()).collect(),
            false => t.bytes.clone(),
        });
        with_header(&header, &data.collect::<Vec<u8>>())
    });
}

#[test]
fn mutated_configs_are_survived() {
    survives("config.json", GOOD.config.to_string().as_bytes(), 3, |bytes| bytes);
}

#[test]
fn mutated_quantisation_is_survived() {
    survives("quantize_config.json", GOOD.quantize.to_string().as_bytes(), 3, |bytes| bytes);
}
