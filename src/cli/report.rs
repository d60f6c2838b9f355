//! The figures of a generation, as a line for people and as JSON.
//!
//! What the speeds count is said at [`peregrine::engine::GenerationStats`].

use peregrine::engine::{Engine, GenerationStats, StopReason};
use peregrine::sampler::Sampling;

/// Everything known at the end of a generation.
pub(super) struct Report<'a> {
    pub(super) engine: &'a Engine,
    pub(super) sampling: &'a Sampling,
    pub(super) stats: GenerationStats,
    /// `None`: Ctrl-C.
    pub(super) stop: Option<StopReason>,
}

impl Report<'_> {
    fn stop_word(&self) -> &'static str {
        match self.stop {
            Some(StopReason::EndOfText) => "end_of_text",
            Some(StopReason::StopString) => "stop_string",
            Some(StopReason::MaxNewTokens) => "max_new_tokens",
            Some(StopReason::ContextFull) => "context_full",
            None => "interrupted",
        }
    }

    /// One line for stderr.
    pub(super) fn line(&self) -> String {
        let stats = &self.stats;
        let speed = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(" at {rate:.1} tokens/s"));
        let mut parts = vec![
            format!("{}{}", count(stats.prompt_tokens, "prompt token"), speed(stats.prefill_rate())),
            format!("{}{}", count(stats.new_tokens, "new token"), speed(stats.decode_rate())),
            format!("first token after {:.1} ms", stats.first_token_seconds * 1e3),
        ];
        if self.sampling.speculate {
            let steps = count(stats.decode_steps, "step");
            parts.insert(2, format!("{steps}, {} of {} drafts right", stats.accepted_drafts, stats.drafts));
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        match (peak_memory_bytes(), self.engine.memory().gpu_used_bytes) {
            (Some(host), Some(gpu)) => {
                parts.push(format!("peak memory {:.0} MiB, {:.0} MiB on the GPU", mib(host), mib(gpu)));
            }
            (Some(host), None) => parts.push(format!("peak memory {:.0} MiB", mib(host))),
            (None, Some(gpu)) => parts.push(format!("memory {:.0} MiB on the GPU", mib(gpu))),
            (None, None) => {}
        }
        let stop = self.stop_word().replace('_', " ");
        format!(
            "{}; stop: {stop}; {} on {}",
            parts.join(", "),
            mode(self.sampling),
            self.engine.device_name()
        )
    }

    /// The last line of `--json`.
    pub(super) fn json(&self) -> serde_json::Value {
        let stats = &self.stats;
        let greedy = is_greedy(self.sampling);
        serde_json::json!({
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "first_token_seconds": stats.first_token_seconds,
            "prompt_tokens_per_second": stats.prefill_rate(),
            "decode_tokens_per_second": stats.decode_rate(),
            "decode_steps": stats.decode_steps,
            "drafts": stats.drafts,
            "accepted_drafts": stats.accepted_drafts,
            "peak_memory_bytes": peak_memory_bytes(),
            "gpu_memory_bytes": self.engine.memory().gpu_used_bytes,
            "stop_reason": self.stop_word(),
            "device": self.engine.device_name(),
            "mode": if greedy { "greedy" } else { "sampling" },
            "seed": if greedy { None } else { Some(self.sampling.seed) },
        })
    }
}

/// Whether the most likely token is always taken.
pub(super) fn is_greedy(sampling: &Sampling) -> bool {
    sampling.temperature == 0.0
}

fn mode(sampling: &Sampling) -> String {
    if is_greedy(sampling) { "greedy".to_string() } else { format!("sampling with seed {}", sampling.seed) }
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The most host memory this process has held, mapped files included; `None` where the system does not say.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
