//! One result, with everything that is needed to compare it with another one later: a flat JSON object, as llama-bench writes.
//!
//! Names are llama-bench's where the meaning is the same; a record is a JSON list of such objects, and `--save` writes what
//! `-o json` prints.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, one_line};

/// A result. Values that were not measured are `null`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row(pub Map<String, Value>);

/// The columns of CSV, in order. JSON has these and no others.
pub const COLUMNS: &[&str] = &[
    // The program and the machine.
    "build_commit",
    "build_version",
    "binary_hash",
    "backends",
    "cpu_info",
    "gpu_info",
    "driver",
    "test_time",
    // The model.
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "load_format",
    "settings",
    // The test. n_seqs: texts together.
    "n_prompt",
    "n_gen",
    "n_depth",
    "n_seqs",
    // Times of the whole test and its rate, over the repetitions.
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
    // First token after a prompt; then per token of a text: mean, and from one arrival to the next.
    "ttft_ns",
    "tpot_ns",
    "itl_p50_ns",
    "itl_p90_ns",
    "itl_p99_ns",
    "itl_max_ns",
    "itl_histogram",
    // Against the machine.
    "gb_per_s",
    "tflop_per_s",
    "read_ceiling_gb_per_s",
    "f16_ceiling_tflop_per_s",
    "floor_share",
    // Memory and loading.
    "gpu_memory",
    "load_ns",
    "load_parts_ns",
    // The GPU meanwhile.
    "sm_mhz_min",
    "sm_mhz_max",
    "memory_mhz",
    "temperature_c",
    "power_w",
];

impl Row {
    /// Sets a value; `name` is one of [`COLUMNS`].
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        debug_assert!(COLUMNS.contains(&name), "{name}");
        self.0.insert(name.to_owned(), value.into());
    }

    /// A number; NaN where there is none.
    #[must_use]
    pub fn number(&self, name: &str) -> f64 {
        self.0.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    /// A list of numbers.
    #[must_use]
    pub fn numbers(&self, name: &str) -> Vec<f64> {
        let list = self.0.get(name).and_then(Value::as_array);
        list.map_or(Vec::new(), |list| list.iter().filter_map(Value::as_f64).collect())
    }

    /// A text; empty where there is none.
    #[must_use]
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// What must be equal for two results to be comparable: model and test.
    #[must_use]
    pub fn key(&self) -> (String, [u64; 4]) {
        let count = |name| self.0.get(name).and_then(Value::as_u64).unwrap_or(0);
        let test = ["n_prompt", "n_gen", "n_depth", "n_seqs"].map(count);
        (self.text("model_type").to_owned(), test)
    }

    /// A line of CSV; lists and objects are JSON in quotes.
    #[must_use]
    pub fn csv(&self) -> String {
        let cell = |name: &&str| match self.0.get(*name).unwrap_or(&Value::Null) {
            Value::Null => String::new(),
            Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
            Value::Number(number) => number.to_string(),
            other => format!("\"{}\"", other.to_string().replace('"', "\"\"")),
        };
        COLUMNS.iter().map(cell).collect::<Vec<_>>().join(",")
    }
}

/// All rows as a JSON list, one a line, so that versions of a record can be compared line by line.
#[must_use]
pub fn to_json(rows: &[Row]) -> String {
    let lines: Vec<String> = rows.iter().map(|row| format!("  {}", Value::Object(row.0.clone()))).collect();
    format!("[\n{}\n]\n", lines.join(",\n"))
}

/// Writes a record.
///
/// # Errors
/// [`Error::Io`].
pub fn save(file: &Path, rows: &[Row]) -> Result<()> {
    let shown = one_line(&file.display().to_string());
    fs::write(file, to_json(rows)).map_err(|e| Error::Io(format!("cannot write {shown}: {e}")))
}

/// Reads a record: what [`save`] wrote, or lines of JSON.
///
/// # Errors
/// [`Error::Usage`] if the file cannot be read or is no record.
pub fn read(file: &Path) -> Result<Vec<Row>> {
    let shown = one_line(&file.display().to_string());
    let text = fs::read_to_string(file).map_err(|e| Error::Usage(format!("cannot read {shown}: {e}")))?;
    parse(&text).ok_or_else(|| {
        Error::Usage(format!("{shown} is no record: wanted what `peregrine bench --save FILE` writes"))
    })
}

/// The rows of a record's text; `None` if it is none.
#[must_use]
pub fn parse(text: &str) -> Option<Vec<Row>> {
    let values: Vec<Value> = match serde_json::from_str(text) {
        Ok(Value::Array(values)) => values,
        _ => text.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>().ok()?,
    };
    let rows = values.into_iter().map(|value| match value {
        Value::Object(map) if map.contains_key("samples_ns") => Some(Row(map)),
        _ => None,
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: u64) -> Row {
        let mut row = Row::default();
        row.set("model_type", "a \"model\", with, commas");
        row.set("n_prompt", n);
        row.set("n_seqs", 1);
        row.set("samples_ns", vec![1.25, 2.0, 3e9]);
        row.set("ttft_ns", Value::Null);
        row
    }

    #[test]
    fn a_record_survives_the_round_trip() {
        let rows = [row(128), row(512)];
        assert_eq!(parse(&to_json(&rows)).unwrap(), rows);
        let lines: String = rows.iter().map(|r| format!("{}\n", Value::Object(r.0.clone()))).collect();
        assert_eq!(parse(&lines).unwrap(), rows);
        assert_eq!(rows[0].numbers("samples_ns"), [1.25, 2.0, 3e9]);
        assert!(rows[0].number("ttft_ns").is_nan());
        assert_ne!(rows[0].key(), rows[1].key());
        for bad in ["", "{}", "[1]", "[{}]", "{\"a\":", "null"] {
            assert!(parse(bad).is_none_or(|rows| rows.is_empty()), "{bad}");
        }
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        let line = row(128).csv();
        assert!(line.contains("\"a \"\"model\"\", with, commas\""), "{line}");
        assert!(line.contains("\"[1.25,2.0,3000000000.0]\""), "{line}");
    }
}
