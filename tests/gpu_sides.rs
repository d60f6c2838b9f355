//! Memory laid out by the sides of L2 (`DevBuf::on_sides`): whether its pieces are where the mask says, and what it takes to make it.
//! Without a GPU the tests print why they were skipped; with PEREGRINE_REQUIRE_GPU=1 they fail instead. On a GPU without sides there are
//! ordinary buffers.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/gpu.rs"]
mod common;

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use common::gpu;
use peregrine::Error;
use peregrine::gpu::{DevBuf, ops};
use peregrine::layout::PIECE_BYTES;

const MB: usize = 1 << 20;

/// These tests look at the GPU's memory and its times, so they take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parity(bits: u32) -> u32 {
    bits.count_ones() % 2
}

#[test]
fn cuda_memory_on_sides_is_memory() {
    let _turn = turn();
    let Some((gpu, stream)) = gpu() else { return };
    let sides = stream.sides();
    let before = gpu.memory().unwrap().0;
    let bytes = 61 * MB + 1;
    let mut buffer = DevBuf::on_sides(&stream, "bytes", bytes).unwrap();
    assert_eq!((buffer.len(), buffer.bytes()), (bytes, bytes as u64));
    assert!(buffer.download(&stream, 0, bytes).unwrap().iter().all(|&byte| byte == 0));
    let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + i / 4093) as u8).collect();
    buffer.upload(&stream, 0, &data).unwrap();
    buffer.upload(&stream, 4 * MB - 1, &[1, 2, 3]).unwrap();
    let mut expected = data;
    expected[4 * MB - 1..][..3].copy_from_slice(&[1, 2, 3]);
    assert!(buffer.download(&stream, 0, bytes).unwrap() == expected);
    assert!(buffer.download(&stream, bytes - 5, 5).unwrap() == expected[bytes - 5..]);
    assert!(buffer.download(&stream, bytes - 5, 6).is_err());
    // Pages that were used before are zeros again.
    drop(buffer);
    let again = DevBuf::on_sides(&stream, "bytes", bytes).unwrap();
    assert!(again.download(&stream, 0, bytes).unwrap().iter().all(|&byte| byte == 0));
    drop(again);
    stream.drop_spare_pages();
    stream.synchronize().unwrap();
    let kept = before.saturating_sub(gpu.memory().unwrap().0);
    eprintln!("{} kept of {} MB, sides: {}", kept, bytes / MB, sides.is_some());
    assert!(kept <= 4 << 20, "{kept} bytes were not given back");
}

#[test]
fn cuda_pieces_are_on_the_side_the_mask_says() {
    let _turn = turn();
    let Some((gpu, stream)) = gpu() else { return };
    let began = Instant::now();
    let Some(sides) = stream.sides() else {
        let mut page = DevBuf::zeros(&stream, "a page", 4 * MB).unwrap();
        let pieces: Vec<u32> = (0..64).collect();
        eprintln!(
            "{} has no sides: cycles of pieces {:?}",
            gpu.name(),
            ops::sides(&stream, &mut page, &pieces, 1)
        );
        let count = gpu.multiprocessors().unwrap();
        eprintln!("by each multiprocessor {:?}", ops::sides(&stream, &mut page, &pieces[..4], count));
        let switched = std::env::var_os("PEREGRINE_NO_SIDES").is_some();
        let ought = !switched && ["H100", "H200"].iter().any(|name| gpu.name().contains(name));
        assert!(!ought, "{} has two sides, and they were not found: was it busy?", gpu.name());
        return;
    };
    let mask = sides.mask();
    eprintln!(
        "{}: mask {mask:#x}, found in {:.1} ms (or before)",
        gpu.name(),
        began.elapsed().as_secs_f64() * 1e3
    );
    let mut blocks: Vec<u8> = sides.block_of().iter().copied().filter(|&block| block != u8::MAX).collect();
    blocks.sort_unstable();
    let count = gpu.multiprocessors().unwrap();
    assert!(blocks.into_iter().map(usize::from).eq(0..count));
    let of_side = |side| (0..256).filter(|&smid| sides.side_of(smid) == Some(side)).count();
    eprintln!("{} : {} multiprocessors; blocks {:?}", of_side(0), of_side(1), &sides.block_of()[..count]);
    assert_eq!(of_side(0) + of_side(1), count);

    let bytes = 61 * MB + 1;
    for round in 0..3 {
        let mut buffer = DevBuf::on_sides(&stream, "bytes", bytes).unwrap();
        let pieces: Vec<u32> = (0..(bytes / PIECE_BYTES) as u32).step_by(37).collect();
        let times = ops::sides(&stream, &mut buffer, &pieces, 1).unwrap();
        let side = sides.side_of(times[0].smid).unwrap();
        let far = |piece: u32| parity((piece * PIECE_BYTES as u32) & mask) != side;
        // The threshold is between the middle ones of either kind.
        let middle = |wanted: bool| {
            let of_kind = pieces.iter().zip(&times[0].cycles).filter(|(piece, _)| far(**piece) == wanted);
            let mut cycles: Vec<u32> = of_kind.map(|(_, &cycles)| cycles).collect();
            cycles.sort_unstable();
            eprintln!(
                "round {round}, far {wanted}: {} pieces, {:?} .. {:?} .. {:?} cycles",
                cycles.len(),
                cycles.first(),
                cycles.get(cycles.len() / 2),
                cycles.last()
            );
            cycles[cycles.len() / 2]
        };
        let (near_cycles, far_cycles) = (middle(false), middle(true));
        assert!(far_cycles > near_cycles + near_cycles / 8, "{near_cycles} near, {far_cycles} far");
        let threshold = (near_cycles + far_cycles) / 2;
        let wrong = pieces.iter().zip(&times[0].cycles).filter(|&(&p, &c)| (c > threshold) != far(p)).count();
        eprintln!("round {round}: {wrong} of {} pieces are not where the mask says", pieces.len());
        assert!(wrong * 100 <= pieces.len());
    }
}

#[test]
fn cuda_what_memory_on_sides_takes() {
    let _turn = turn();
    let Some((gpu, stream)) = gpu() else { return };
    let _ = stream.sides();
    let make = |on_sides: bool| {
        let before = gpu.memory().unwrap().0;
        let began = Instant::now();
        let mut buffers = Vec::new();
        for _ in 0..64 {
            let made = if on_sides {
                DevBuf::on_sides(&stream, "bytes", 55 * MB)
            } else {
                DevBuf::zeros(&stream, "bytes", 55 * MB)
            };
            match made {
                Ok(buffer) => buffers.push(buffer),
                Err(Error::OutOfGpuMemory { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        stream.synchronize().unwrap();
        let made = began.elapsed();
        let with_spares = before.saturating_sub(gpu.memory().unwrap().0);
        let began = Instant::now();
        stream.drop_spare_pages();
        let spares = began.elapsed();
        let taken = before.saturating_sub(gpu.memory().unwrap().0);
        let began = Instant::now();
        let count = buffers.len();
        drop(buffers);
        stream.synchronize().unwrap();
        let dropped = began.elapsed();
        let kept = before.saturating_sub(gpu.memory().unwrap().0);
        eprintln!(
            "{count} buffers of 55 MB, on sides {on_sides}: made in {:.1} ms, spares ({} MB) dropped in {:.1} ms, {} MB taken, freed in {:.1} ms, {} MB kept",
            made.as_secs_f64() * 1e3,
            with_spares.saturating_sub(taken) as usize / MB,
            spares.as_secs_f64() * 1e3,
            taken as usize / MB,
            dropped.as_secs_f64() * 1e3,
            kept as usize / MB,
        );
        assert!(kept <= 4 << 20);
    };
    for _ in 0..2 {
        make(true);
        make(false);
    }
}

#[test]
fn cuda_memory_on_sides_runs_out_by_name() {
    let _turn = turn();
    let Some((gpu, stream)) = gpu() else { return };
    let _ = stream.sides();
    let (free, total) = gpu.memory().unwrap();
    let error = DevBuf::on_sides(&stream, "too much", total as usize + 1).err();
    let Some(Error::OutOfGpuMemory { what, needed_bytes, free_bytes }) = error else { panic!("{error:?}") };
    assert_eq!((what.as_str(), needed_bytes), ("too much", total + 1));
    eprintln!("{free_bytes:?} free of {total}, {free} before");
    let kept = free.saturating_sub(gpu.memory().unwrap().0);
    assert!(kept <= 4 << 20, "{kept} bytes were not given back");
    assert!(DevBuf::on_sides(&stream, "enough", 3 * MB).is_ok());
}

#[test]
fn cuda_sides_can_be_switched_off() {
    let _turn = turn();
    if gpu().is_none() {
        return;
    }
    let this = std::env::current_exe().unwrap();
    let status = Command::new(this)
        .args(["--ignored", "--exact", "without_sides"])
        .env("PEREGRINE_NO_SIDES", "1")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "run by cuda_sides_can_be_switched_off, in a process of its own"]
fn without_sides() {
    let Some((_, stream)) = gpu() else { return };
    if std::env::var_os("PEREGRINE_NO_SIDES").is_none() {
        return;
    }
    assert!(stream.sides().is_none());
    let buffer = DevBuf::on_sides(&stream, "bytes", 3 * MB + 5).unwrap();
    assert!(buffer.download(&stream, 0, 3 * MB + 5).unwrap().iter().all(|&byte| byte == 0));
}
