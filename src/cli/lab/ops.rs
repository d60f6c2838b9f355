//! `lab list`, `check`, `bench`, `report`: the built-in kernels.

use std::path::{Path, PathBuf};
use std::process::Command;

use peregrine::error::one_line;
use peregrine::gpu::{Gpu, Stream};
use peregrine::lab::check::{self, Finding};
use peregrine::lab::{self, calls, compile, report, time};
use peregrine::measure::machine;
use peregrine::measure::stats;
use peregrine::{Error, Result};
use serde_json::{Map, Value, json};

use super::super::{bench, interrupt, output};
use super::{Options, known};

/// The GPU of `--device`, and a stream.
pub(super) fn gpu(options: &Options) -> Result<(Gpu, Stream)> {
    let ordinal = options
        .model
        .ordinal()
        .ok_or_else(|| Error::Usage("lab: kernels need a GPU, not --device cpu".into()))?;
    let gpu = Gpu::open(ordinal)?;
    let stream = gpu.shared_stream()?;
    Ok((gpu, stream))
}

/// The table of all ops; floors are this GPU's if there is one.
pub(super) fn list(options: &Options) -> Result<()> {
    let (ceilings, whose) =
        match gpu(options).and_then(|(gpu, stream)| Ok((machine::ceilings(&gpu, &stream)?, gpu))) {
            Ok((ceilings, gpu)) => (ceilings, format!("{}, measured now", gpu.name())),
            Err(Error::NoGpu(_)) => (machine::H200, "an H200, as there is no GPU here".to_owned()),
            Err(error) => return Err(error),
        };
    output::print(&format!("{}\nfloors of {whose}: {ceilings}\n", lab::list::table(ceilings)))?;
    let ops = calls::OPS.iter().map(|(op, what)| format!("  {op:<13} {what}\n")).collect::<String>();
    output::print(&format!("\nops that lab check, bench, new and try take:\n{ops}"))
}

/// The op asked for, or all.
fn chosen(op: Option<&str>) -> Result<Vec<&str>> {
    match op {
        Some(op) => known(op).map(|()| vec![op]),
        None => Ok(calls::OPS.iter().map(|op| op.0).collect()),
    }
}

/// Checks ops; a failure of any is one of the command.
pub(super) fn check(options: &Options, op: Option<&str>) -> Result<()> {
    interrupt::install()?;
    let ops = chosen(op)?;
    let (_, stream) = gpu(options)?;
    let (mut wrong, mut all) = (0, 0);
    for op in ops {
        for call in &mut calls::own_calls(op, &stream, false)? {
            let finding = check::check(call.as_mut(), &stream, &mut |_| Ok(()))?;
            // A built-in kernel takes all of these.
            wrong += usize::from(!finding.faults.is_empty() || finding.declined);
            all += 1;
            output::print(&shown(&finding))?;
        }
    }
    if wrong > 0 {
        return Err(Error::Io(format!("{wrong} of {all} calls are wrong")));
    }
    output::print(&format!("all {all} calls are right, and give the same bits twice\n"))
}

/// A finding as lines: the verdict, what is wrong, and how far off each output is with its worst element.
pub(super) fn shown(finding: &Finding) -> String {
    let Finding { label, declined, measured, faults } = finding;
    let verdict = match (declined, faults.is_empty()) {
        (true, _) => "declined",
        (_, true) => "right",
        (_, false) => "WRONG",
    };
    // A fault says what its measurement says.
    let lines = faults.iter().chain(measured.iter().filter(|line| !faults.contains(line)));
    let lines = lines.map(|line| format!("          {line}\n")).collect::<String>();
    format!("{verdict:<8}  {label}\n{lines}")
}

/// Times ops beside their floors and a record.
pub(super) fn bench(options: &Options, op: Option<&str>) -> Result<()> {
    interrupt::install()?;
    let ops = chosen(op)?;
    options.save.iter().try_for_each(|file| output::require_folder(file))?;
    let (gpu, stream) = gpu(options)?;
    let ceilings = machine::ceilings(&gpu, &stream)?;
    let file = options.record.clone().unwrap_or_else(|| record_of(gpu.name()));
    let record = read_record(&file);
    let mut timer = time::Timer::new(&gpu, &stream)?;
    let mut saved = Map::new();
    output::print(&format!("{} {:>10}\n", time::heading(), "record"))?;
    for op in ops {
        for call in &mut calls::own_calls(op, &stream, true)? {
            call.reset(&stream)?;
            let times = timer.times(&mut |stream| call.launch(stream))?;
            let label = call.label();
            let (cold, warm) = (stats::median(&times.cold), stats::median(&times.warm));
            let before = record.get(&label).and_then(|r| r["cold_us"].as_f64());
            let before = before.map_or(String::new(), |us| format!("x {:.3}", cold / us));
            let row = time::row(&label, call.work(), &times, ceilings);
            output::print(&format!("{row} {before:>10}\n"))?;
            saved.insert(label, json!({ "cold_us": cold, "warm_us": warm }));
        }
    }
    let against =
        if record.is_empty() { "no record".to_owned() } else { one_line(&file.display().to_string()) };
    output::print(&format!(
        "\n{}: {ceilings}. {}; record: cold time over that of {against}.\n",
        gpu.name(),
        time::NOTE
    ))?;
    let Some(file) = &options.save else { return Ok(()) };
    let driver = machine::Instruments::open(options.model.ordinal().unwrap_or(0)).names();
    let record = json!({
        "gpu": gpu.name(),
        "driver": driver.map_or(String::new(), |names| names.1),
        "build_commit": bench::commit(),
        "test_time": bench::time_of_day(),
        "read_ceiling_gb_per_s": ceilings.bytes_per_second / 1e9,
        "f16_ceiling_tflop_per_s": ceilings.flop_per_second / 1e12,
        "calls": saved,
    });
    let text = format!("{record:#}\n");
    let shown = one_line(&file.display().to_string());
    std::fs::write(file, text).map_err(|e| Error::Io(format!("cannot write {shown}: {e}")))
}

/// `benches/records/lab-NVIDIA-H200.json`.
fn record_of(gpu: &str) -> PathBuf {
    PathBuf::from("benches/records").join(format!("lab-{}.json", gpu.replace([' ', '/'], "-")))
}

/// The calls of a record; none if there is none.
fn read_record(file: &Path) -> Map<String, Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let record: Value = serde_json::from_str(&text).unwrap_or_default();
    record["calls"].as_object().cloned().unwrap_or_default()
}

/// What ptxas said of the built-in kernels, and their machine code.
pub(super) fn report(options: &Options, op: Option<&str>) -> Result<()> {
    let mut kernels = Vec::new();
    let (mut names, mut found) = (Vec::new(), false);
    for name in lab::names() {
        if op.is_none_or(|op| op == name) {
            found = true;
            names.push(name);
            let said = lab::source(&format!("{name}.ptxas.txt")).unwrap_or_default();
            kernels.extend(report::kernels(said));
        }
    }
    if !found {
        let known = lab::names().collect::<Vec<_>>().join(", ");
        return Err(Error::Usage(format!("no kernel file of that name: there are {known}")));
    }
    output::print(&report::table(&kernels))?;
    if options.sass {
        let program =
            std::env::current_exe().map_err(|e| Error::Io(format!("cannot find this program: {e}")))?;
        sass(&program, op.map(|_| names.as_slice()))?;
    }
    Ok(())
}

/// The machine code in a file; of these kernel files alone, if given.
pub(super) fn sass(file: &Path, names: Option<&[&str]>) -> Result<()> {
    let Some(cuobjdump) = compile::tool("cuobjdump") else {
        output::note("--sass: there is no cuobjdump; it comes with the CUDA toolkit");
        return Ok(());
    };
    let said = Command::new(cuobjdump).arg("-sass").arg(file).output();
    let said = said.map_err(|e| Error::Io(format!("cannot run cuobjdump: {e}")))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let Some(names) = names else { return output::print(&text) };
    for function in text.split("\t\tFunction : ").skip(1) {
        let head = function.lines().next().unwrap_or_default();
        if names.iter().any(|name| head.contains(&format!("_{name}_cu_"))) {
            output::print(&format!("Function : {function}"))?;
        }
    }
    Ok(())
}
