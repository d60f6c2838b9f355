//! `peregrine bench` on the CPU with random weights of a tiny shape.

use std::fs;

use crate::program::{Outcome, assert_refused, folder, run};

/// A short run.
fn bench(args: &[&str]) -> Outcome {
    let mut all = vec!["bench", "--load-format", "dummy", "-m", "tiny", "--device", "cpu", "-r", "2"];
    all.extend(args);
    run(&all)
}

#[test]
fn every_format_has_every_test() {
    let tests = ["-p", "4,8", "-n", "3", "-d", "0,16", "-b", "1,2"];
    let md = bench(&tests);
    assert_eq!(md.code, 0, "{}", md.err);
    for name in ["pp4 ", "pp8 @ d16", "tg3 @ d16", "t/s", "loaded in", "binary"] {
        assert!(md.out.contains(name), "{name}: {}", md.out);
    }
    let table: Vec<&str> = md.out.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(table.len(), 2 + 12);
    let width = table[0].chars().count();
    assert!(table.iter().all(|line| line.chars().count() == width), "{}", md.out);

    let json = bench(&[&tests[..], &["-o", "json"]].concat());
    let rows: Vec<serde_json::Value> = serde_json::from_str(&json.out).unwrap();
    assert_eq!(rows.len(), 12);
    for row in &rows {
        assert_eq!(row["samples_ns"].as_array().unwrap().len(), 2);
        assert!(row["avg_ts"].as_f64().unwrap() > 0.0 && row["model_n_params"].as_u64().unwrap() > 1_000_000);
        assert_eq!(row["backends"], "CPU");
        assert!(row["floor_share"].is_null());
    }
    let lines = bench(&["-p", "4", "-n", "3", "-o", "jsonl"]).out;
    assert_eq!(lines.lines().count(), 2);
    assert!(lines.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));
    let csv = bench(&["-p", "4", "-n", "0", "-o", "csv"]).out;
    assert!(csv.starts_with("build_commit,") && csv.lines().count() == 2, "{csv}");
}

#[test]
fn records_are_saved_compared_and_plotted() {
    let folder = folder("bench");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    let (record, svg, html) = (path("record.json"), path("plot.svg"), path("plot.html"));
    let saved = bench(&["-p", "4", "-n", "3", "--save", &record, "--plot", &svg]);
    assert_eq!(saved.code, 0, "{}", saved.err);
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    assert_eq!(rows.len(), 2);
    assert!(fs::read_to_string(&svg).unwrap().trim_end().ends_with("</svg>"));
    let compared = bench(&["-p", "4,8", "-n", "3", "--compare", &record, "--plot", &html]);
    assert_eq!(compared.code, 0, "{}", compared.err);
    // Which one depends on what else this machine does; the decisions are tested on seeded times.
    let decided = |line: &&str| ["no difference", "slower", "faster"].iter().any(|word| line.contains(word));
    assert_eq!(compared.out.lines().filter(decided).count(), 2, "{}", compared.out);
    assert!(compared.out.contains("1 tests are not in the record"), "{}", compared.out);
    assert!(!compared.out.contains('\x1b'), "a colour in a pipe");
    assert!(fs::read_to_string(&html).unwrap().contains("<svg"));
    let turns = bench(&["-p", "4", "-n", "0", "--vs", "PEREGRINE_NO_GRAPH=1"]);
    assert_eq!(turns.code, 0, "{}", turns.err);
    assert!(turns.out.contains("pp4") && turns.out.contains("PEREGRINE_NO_GRAPH=1"), "{}", turns.out);
}

#[test]
fn wrong_usage_is_refused() {
    let missing = folder("bench-wrong").join("none.json");
    for (args, word) in [
        (&["-p", "1,x"][..], "1,x"),
        (&["-b", "65"], "64"),
        (&["-r", "0"], "-r"),
        (&["-o", "xml"], "jsonl"),
        (&["--plot", "picture.png"], ".svg"),
        (&["--save", "no/such/folder/x.json"], "no such folder"),
        (&["--load-format", "pickle"], "dummy"),
        (&["--compare", missing.to_str().unwrap()], "none.json"),
        (&["-m", "falcon-8b"], "falcon-7b"),
        (&["-p", "0", "-n", "0"], "no test"),
        (&["--vs", "no/such/program"], "no/such/program"),
    ] {
        println!("{args:?}");
        let outcome = bench(args);
        if word == "falcon-7b" {
            assert_eq!(outcome.code, 2, "{}", outcome.err);
            assert!(outcome.err.contains(word), "{}", outcome.err);
        } else if word == "no test" {
            assert!(outcome.code == 2 && outcome.err.contains(word), "{}", outcome.err);
        } else {
            assert_refused(&outcome, 2, &[word]);
        }
    }
    let outcome = bench(&["--breakdown", "-p", "2", "-n", "0"]);
    assert_eq!(outcome.code, 3, "{}", outcome.err);
}
