//! Rows as a Markdown table, and what stands below it.

use peregrine::measure::machine::Ceilings;
use peregrine::measure::row::Row;

/// A spread above this part of the mean is worth a warning.
const WIDE_SPREAD: f64 = 0.03;
/// A clock below this part of the highest seen too.
const CLOCK_DROP: f64 = 0.95;

/// The table: llama-bench's columns, then ours. What llama-bench repeats in every row stands above it: lines stay short enough for a
/// terminal.
pub(super) fn md(rows: &[Row]) -> String {
    let head = ["n_seqs", "test", "t/s", "ms", "p50 / p90 / p99 / max ms", "GB/s", "TFLOP/s", "of floor"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    cells.extend(rows.iter().map(line));
    let model = rows.first().map_or(String::new(), |row| {
        let (size, parameters) = (size(row.number("model_size")), parameters(row.number("model_n_params")));
        let (model, backend) = (row.text("model_type"), row.text("backends"));
        format!("{model}, {size}, {parameters} parameters, {backend}\n\n")
    });
    model + &aligned(&cells, 0)
}

fn line(row: &Row) -> Vec<String> {
    let ms = |name| format!("{:.3}", row.number(name) / 1e6);
    let known = |text: String, value: f64| if value.is_nan() { String::new() } else { text };
    let (time, gaps) = if row.number("n_gen") > 0.0 {
        let quantiles = ["itl_p50_ns", "itl_p90_ns", "itl_p99_ns", "itl_max_ns"].map(ms);
        (format!("{} a token", ms("tpot_ns")), quantiles.join(" / "))
    } else {
        (format!("{} to first", ms("ttft_ns")), String::new())
    };
    let share = row.number("floor_share");
    vec![
        format!("{:.0}", row.number("n_seqs")),
        name(row),
        format!("{:.2} ± {:.2}", row.number("avg_ts"), row.number("stddev_ts")),
        time,
        gaps,
        format!("{:.0}", row.number("gb_per_s")),
        format!("{:.1}", row.number("tflop_per_s")),
        known(format!("{:.0} %", share * 100.0), share),
    ]
}

fn size(bytes: f64) -> String {
    let mib = bytes / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.2} MiB") }
}

fn parameters(count: f64) -> String {
    if count >= 1e9 { format!("{:.2} B", count / 1e9) } else { format!("{:.2} M", count / 1e6) }
}

/// The test of a row.
fn test(row: &Row) -> peregrine::measure::run::Test {
    let count = |name| row.number(name) as usize;
    peregrine::measure::run::Test {
        prompt: count("n_prompt"),
        generate: count("n_gen"),
        depth: count("n_depth"),
        texts: count("n_seqs"),
    }
}

/// `tg128 @ d1024`.
pub(super) fn name(row: &Row) -> String {
    test(row).name()
}

/// Markdown whose columns line up; those from `right` on to the right.
pub(super) fn aligned(cells: &[Vec<String>], right: usize) -> String {
    let columns = cells.first().map_or(0, Vec::len);
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (i, row) in cells.iter().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            let (before, after) = if column >= right { (pad.as_str(), "") } else { ("", pad.as_str()) };
            text.push_str(&format!("| {before}{cell}{after} "));
        }
        text.push_str("|\n");
        if i == 0 {
            for (column, width) in widths.iter().enumerate() {
                let dashes = "-".repeat(*width);
                text.push_str(&if column >= right {
                    format!("| {}: ", &dashes[1..])
                } else {
                    format!("| {dashes} ")
                });
            }
            text.push_str("|\n");
        }
    }
    text
}

/// What is the same for all rows.
pub(super) fn foot(rows: &[Row], ceilings: Option<Ceilings>) -> String {
    let Some(row) = rows.first() else { return String::new() };
    let mut lines = Vec::new();
    if row.text("gpu_info").is_empty() {
        lines.push(format!("CPU {}", row.text("cpu_info")));
    } else {
        let ceilings = ceilings.map_or(String::new(), |c| {
            format!(
                "; ceilings measured in this run: {:.2} TB/s read, {:.0} TFLOP/s dense f16",
                c.bytes_per_second / 1e12,
                c.flop_per_second / 1e12
            )
        });
        lines.push(format!("{}, driver {}{ceilings}", row.text("gpu_info"), row.text("driver")));
        let extreme = |name: &str, most: bool| {
            let values = rows.iter().map(|row| row.number(name));
            values.fold(f64::NAN, if most { f64::max } else { f64::min })
        };
        if !extreme("sm_mhz_min", false).is_nan() {
            lines.push(format!(
                "seen meanwhile: {:.0} to {:.0} MHz, memory {:.0} MHz, up to {:.0} °C and {:.0} W",
                extreme("sm_mhz_min", false),
                extreme("sm_mhz_max", true),
                extreme("memory_mhz", true),
                extreme("temperature_c", true),
                extreme("power_w", true)
            ));
        }
        lines.push(format!(
            "GPU memory in use, by all: {:.0} MB after loading",
            row.number("gpu_memory") / 1e6
        ));
    }
    let parts = row.0.get("load_parts_ns").and_then(serde_json::Value::as_array);
    let parts = parts.map_or(Vec::new(), |parts| {
        let part = |part: &serde_json::Value| {
            format!("{} {:.3}", part[0].as_str().unwrap_or_default(), part[1].as_f64().unwrap_or(0.0) / 1e9)
        };
        parts.iter().map(part).collect()
    });
    lines.push(format!("loaded in {:.3} s: {}", row.number("load_ns") / 1e9, parts.join(", ")));
    lines.push(format!(
        "peregrine {} ({}), binary {}, {} weights{}",
        row.text("build_version"),
        row.text("build_commit"),
        row.text("binary_hash"),
        if row.text("load_format") == "dummy" { "random" } else { "the model's" },
        if row.text("settings").is_empty() { String::new() } else { format!(", {}", row.text("settings")) }
    ));
    format!("\n{}\n", lines.join("\n"))
}

/// What makes a row doubtful.
pub(super) fn doubts(row: &Row) -> Vec<String> {
    let mut doubts = Vec::new();
    let (name, texts) = (name(row), test(row).together());
    let spread = row.number("stddev_ts") / row.number("avg_ts");
    if spread > WIDE_SPREAD {
        doubts.push(format!("{name}, {texts}: the repetitions spread by {:.1} %", spread * 100.0));
    }
    let (least, most) = (row.number("sm_mhz_min"), row.number("sm_mhz_max"));
    if least < most * CLOCK_DROP {
        doubts.push(format!("{name}, {texts}: the clock dropped from {most:.0} to {least:.0} MHz"));
    }
    doubts
}
