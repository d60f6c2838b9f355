//! `peregrine bench` on a GPU, with random weights of a tiny shape. Skipped, loudly, where there is none.
#![cfg(all(feature = "cuda", feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "common/gpu.rs"]
mod gpu;

use std::process::Command;

/// Steps, the first token's choice and prompts are taken apart launch by launch, also where the launches behind that choice are captured.
#[test]
fn a_breakdown_has_every_op_of_every_pass() {
    let Some(_) = gpu::gpu() else { return };
    let args =
        ["bench", "--load-format", "dummy", "-m", "tiny", "-p", "0", "-n", "8", "-r", "1", "--breakdown"];
    let output = Command::new(env!("CARGO_BIN_EXE_peregrine")).args(args).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    let step =
        out.split("\nstep by one kernel an op").nth(1).unwrap_or_else(|| panic!("no step: {out}{err}"));
    let (step, prompt) = step.split_once("\nprompt of").unwrap_or_else(|| panic!("no prompt: {out}{err}"));
    let launches = |pass: &str, op: &str| {
        let line = pass.lines().find(|line| line.starts_with(op));
        let fields =
            line.unwrap_or_else(|| panic!("no {op}: {out}")).trim_start_matches(op).split_whitespace();
        let numbers: Vec<f64> = fields.filter_map(|field| field.parse().ok()).collect();
        assert!(numbers[1] > 0.0 && numbers[1] < 1e5, "{op}, us: {out}");
        numbers[0]
    };
    let layers = launches(step, "attn_decode");
    for op in ["gptq_gemv [qkv ; up]", "gptq_gemv [down | dense]"] {
        assert_eq!(launches(step, op), layers, "{op}: {out}");
    }
    for op in ["embed", "head", "sample"] {
        assert_eq!(launches(step, op), 1.0, "{op}: {out}");
    }
    assert_eq!(launches(prompt, "attn_prefill"), layers, "{out}");
}
