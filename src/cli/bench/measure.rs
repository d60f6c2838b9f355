//! Runs the tests and makes rows of them.

use std::time::{SystemTime, UNIX_EPOCH};

use peregrine::engine::Engine;
use peregrine::measure::machine::{Ceilings, Seen};
use peregrine::measure::row::Row;
use peregrine::measure::run::{Runner, Sample, Test};
use peregrine::measure::{stats, work};
use peregrine::sampler::Sampling;
use peregrine::{Error, Result};
use serde_json::{Value, json};

use super::super::{interrupt, output};
use super::load::Loaded;
use super::{Format, Options};

/// Bins of the histogram of gaps between tokens.
const BINS: usize = 40;

/// Every test.
pub(super) fn all(options: &Options, loaded: &Loaded, ceilings: Option<Ceilings>) -> Result<Vec<Row>> {
    let common = common(options, loaded, ceilings);
    let mut runner = Runner::new(loaded.engine.clone(), sampling(options));
    let watch = interrupt::watch();
    let mut rows = Vec::new();
    for (i, test) in options.tests.iter().enumerate() {
        if test.positions() > loaded.engine.config().max_positions {
            let (name, texts, positions) = (test.name(), test.together(), test.positions());
            options.model.say(&format!("skipped {name}, {texts}: it needs {positions} positions"));
            continue;
        }
        progress(
            options,
            &format!("[{}/{}] {} of {}", i + 1, options.tests.len(), test.name(), test.together()),
        );
        runner.once(test)?;
        let monitor = loaded.instruments.watch();
        let mut samples = Vec::with_capacity(options.repetitions);
        for _ in 0..options.repetitions {
            watch.check()?;
            samples.push(runner.once(test)?);
        }
        let mut row = common.clone();
        describe(&mut row, runner.engine(), test, &samples, ceilings);
        seen(&mut row, monitor.seen());
        if options.format == Format::JsonLines {
            output::print(&format!("{}\n", Value::Object(row.0.clone())))?;
        }
        rows.push(row);
    }
    progress(options, "");
    if rows.is_empty() {
        return Err(Error::Usage("no test is left to run: give -p or -n that fit the model".into()));
    }
    Ok(rows)
}

/// How tokens are chosen: greedily, or as the model's card says.
pub(super) fn sampling(options: &Options) -> Sampling {
    if options.temperature == 0.0 {
        return Sampling::greedy();
    }
    Sampling { top_k: 50, top_p: 0.95, repetition_penalty: 1.15, ..Sampling::greedy() }
        .temperature(options.temperature)
}

/// A line on stderr that overwrites itself, on a terminal alone.
fn progress(options: &Options, line: &str) {
    if output::progress_wanted(options.model.quiet) {
        output::ask(&format!("\r\x1b[K{line}"));
    }
}

/// What all rows have in common.
fn common(options: &Options, loaded: &Loaded, ceilings: Option<Ceilings>) -> Row {
    let engine = &loaded.engine;
    let (config, memory) = (engine.config(), engine.memory());
    let on_gpu = memory.gpu_used_bytes.is_some();
    let (gpu, driver) = loaded.instruments.names().filter(|_| on_gpu).unwrap_or_default();
    let mut row = Row::default();
    row.set("build_commit", commit());
    row.set("build_version", env!("CARGO_PKG_VERSION"));
    row.set("binary_hash", binary_hash());
    row.set("backends", if on_gpu { "CUDA" } else { "CPU" });
    row.set("cpu_info", cpu());
    row.set("gpu_info", gpu);
    row.set("driver", driver);
    row.set("test_time", time_of_day());
    row.set("model_filename", if options.dummy { "dummy" } else { engine.checkpoint().name() });
    let parameters = work::parameters(config);
    let group = engine.checkpoint().quant().group_size.map_or("all".to_owned(), |g| g.to_string());
    row.set("model_type", format!("falcon {} GPTQ 4-bit g{group}", short(parameters)));
    row.set("model_size", memory.weight_bytes);
    row.set("model_n_params", parameters as u64);
    row.set("load_format", if options.dummy { "dummy" } else { "auto" });
    row.set("settings", settings());
    row.set("gpu_memory", loaded.gpu_bytes.map_or(Value::Null, Value::from));
    let parts: Vec<Value> =
        loaded.parts.iter().map(|&(name, seconds)| json!([name, (seconds * 1e9).round()])).collect();
    row.set("load_ns", (loaded.parts.iter().map(|part| part.1).sum::<f64>() * 1e9).round());
    row.set("load_parts_ns", parts);
    if let Some(ceilings) = ceilings.filter(|_| on_gpu) {
        row.set("read_ceiling_gb_per_s", ceilings.bytes_per_second / 1e9);
        row.set("f16_ceiling_tflop_per_s", ceilings.flop_per_second / 1e12);
    }
    row
}

/// A test's own figures.
fn describe(row: &mut Row, engine: &Engine, test: &Test, samples: &[Sample], ceilings: Option<Ceilings>) {
    let tokens = (test.texts * test.prompt.max(test.generate)) as f64;
    let seconds: Vec<f64> = samples.iter().map(|s| s.seconds).collect();
    let rates: Vec<f64> = seconds.iter().map(|s| tokens / s).collect();
    let ns = |seconds: f64| (seconds * 1e9).round();
    for (name, count) in
        [("n_prompt", test.prompt), ("n_gen", test.generate), ("n_depth", test.depth), ("n_seqs", test.texts)]
    {
        row.set(name, count);
    }
    row.set("avg_ns", ns(stats::mean(&seconds)));
    row.set("stddev_ns", ns(stats::deviation(&seconds)));
    row.set("avg_ts", stats::mean(&rates));
    row.set("stddev_ts", stats::deviation(&rates));
    row.set("samples_ns", seconds.iter().map(|&s| ns(s)).collect::<Vec<f64>>());
    row.set("samples_ts", rates);
    let (work, seconds) = if test.generate == 0 {
        row.set("ttft_ns", ns(stats::mean(&seconds)));
        (work::prompt(engine, test.prompt, test.depth, test.texts), stats::mean(&seconds))
    } else {
        let gaps: Vec<f64> = samples.iter().flat_map(|s| s.gaps.iter().copied()).collect();
        let step = stats::mean(&seconds) / test.generate as f64;
        row.set("tpot_ns", ns(step));
        for (name, q) in [("itl_p50_ns", 0.5), ("itl_p90_ns", 0.9), ("itl_p99_ns", 0.99), ("itl_max_ns", 1.0)]
        {
            row.set(name, ns(stats::quantile(&gaps, q)));
        }
        row.set("itl_histogram", histogram(&gaps));
        let context = test.depth as f64 + 1.0 + (test.generate as f64 - 1.0) / 2.0;
        (work::step(engine, context, test.texts), step)
    };
    row.set("gb_per_s", work.bytes / seconds / 1e9);
    row.set("tflop_per_s", work.flop / seconds / 1e12);
    if let Some(c) = ceilings.filter(|_| engine.memory().gpu_used_bytes.is_some()) {
        row.set("floor_share", work.floor_seconds(c.bytes_per_second, c.flop_per_second) / seconds);
    }
}

/// First and last edge in ns, and the count in each of equal bins between: of all but the shortest and the longest half percent, which
/// are in the first and the last bin.
fn histogram(gaps: &[f64]) -> Value {
    let (low, high) = (stats::quantile(gaps, 0.005), stats::quantile(gaps, 0.995));
    let width = ((high - low) / BINS as f64).max(1e-9);
    let mut counts = [0u64; BINS];
    for gap in gaps {
        // A negative place is 0.
        counts[(((gap - low) / width) as usize).min(BINS - 1)] += 1;
    }
    json!({ "from_ns": low * 1e9, "to_ns": (low + width * BINS as f64) * 1e9, "counts": counts.to_vec() })
}

fn seen(row: &mut Row, seen: Option<Seen>) {
    let Some(seen) = seen else { return };
    row.set("sm_mhz_min", seen.least_sm_mhz);
    row.set("sm_mhz_max", seen.most_sm_mhz);
    row.set("memory_mhz", seen.memory_mhz);
    row.set("temperature_c", seen.celsius);
    row.set("power_w", seen.watts);
}

/// 7.2B, 10M.
fn short(parameters: f64) -> String {
    if parameters >= 1e9 { format!("{:.0}B", parameters / 1e9) } else { format!("{:.0}M", parameters / 1e6) }
}

/// The switches of this process that change what is measured.
fn settings() -> String {
    let switches =
        std::env::vars().filter(|(name, value)| name.starts_with("PEREGRINE_") && !value.is_empty());
    let mut switches: Vec<String> = switches.map(|(name, value)| format!("{name}={value}")).collect();
    switches.sort();
    switches.join(",")
}

/// FNV-1a over the program's file: says whether two results are of one binary.
fn binary_hash() -> String {
    let bytes = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let mix = |hash: u64, word: &[u8]| {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        (hash ^ u64::from_le_bytes(padded)).wrapping_mul(0x100_0000_01b3)
    };
    format!("{:016x}", bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, mix))
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    name.trim_start_matches([' ', '\t', ':']).to_owned()
}

/// What this program was built from.
pub(in super::super) fn commit() -> &'static str {
    option_env!("PEREGRINE_COMMIT").unwrap_or("not recorded")
}

/// Now in UTC, as llama-bench writes it: 2025-01-31T12:00:00Z.
pub(in super::super) fn time_of_day() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    // Days to a date by counting eras of 400 years from 1 March of year 0.
    let (days, rest) = ((seconds / 86400) as i64 + 719_468, seconds % 86400);
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let part = (5 * day_of_year + 2) / 153;
    let month = if part < 10 { part + 3 } else { part - 9 };
    let (year, day) = (year + era * 400 + i64::from(month <= 2), day_of_year - (153 * part + 2) / 5 + 1);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}
