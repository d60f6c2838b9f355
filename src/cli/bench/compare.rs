//! Results beside those of a record.

use peregrine::measure::row::Row;
use peregrine::measure::stats::{self, Comparison, Verdict};

use super::super::output;
use super::table;

/// The table of what both have.
pub(super) fn with(earlier: &[Row], rows: &[Row], resolution: f64) -> String {
    let mut compared = Vec::new();
    let mut missing = 0;
    for row in rows {
        match earlier.iter().find(|old| old.key() == row.key()) {
            Some(old) => {
                let found =
                    stats::compare(&old.numbers("samples_ns"), &row.numbers("samples_ns"), resolution);
                compared.push((row, old.number("avg_ts"), row.number("avg_ts"), found));
            }
            None => missing += 1,
        }
    }
    let mut text = format!("\n{}", lines(&compared, ["record", "now"]));
    let of = |name: &str| {
        let (old, new) =
            (earlier.first().map_or("", |r| r.text(name)), rows.first().map_or("", |r| r.text(name)));
        (old != new).then(|| format!("{name}: record {old}, now {new}\n"))
    };
    text.extend(
        ["gpu_info", "driver", "build_commit", "binary_hash", "settings", "model_filename"]
            .into_iter()
            .filter_map(of),
    );
    if missing > 0 {
        text.push_str(&format!("{missing} tests are not in the record\n"));
    }
    text
}

/// One line a test: both rates, ratio of times, interval, verdict.
pub(super) fn lines(compared: &[(&Row, f64, f64, Comparison)], names: [&str; 2]) -> String {
    let head = [
        "test",
        "n_seqs",
        &format!("{} t/s", names[0]),
        &format!("{} t/s", names[1]),
        "time",
        "95 % interval",
        "verdict",
    ]
    .map(str::to_owned);
    let mut cells = vec![head.to_vec()];
    for (row, old, new, found) in compared {
        cells.push(vec![
            table::name(row),
            format!("{:.0}", row.number("n_seqs")),
            format!("{old:.2}"),
            format!("{new:.2}"),
            format!("x {:.4}", found.ratio),
            format!("{:.4} .. {:.4}", found.low, found.high),
            found.verdict.word().to_owned(),
        ]);
    }
    coloured(table::aligned(&cells, 1))
}

/// The verdicts in colour, on a terminal that wants it.
fn coloured(text: String) -> String {
    if !output::coloured() {
        return text;
    }
    let slower = Verdict::Slower.word();
    let faster = Verdict::Faster.word();
    text.replace(slower, &format!("\x1b[31m{slower}\x1b[0m"))
        .replace(faster, &format!("\x1b[32m{faster}\x1b[0m"))
}
