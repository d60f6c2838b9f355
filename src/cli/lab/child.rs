//! The process that runs a stranger's kernel; `attempt` reads what it says.

use std::path::Path;

use peregrine::gpu::Stream;
use peregrine::gpu::ops::DECLINED;
use peregrine::gpu::swap::Swap;
use peregrine::lab::{calls, check, model, time};
use peregrine::measure::machine;
use peregrine::measure::stats::{self, Comparison};
use peregrine::{Error, Result};

use super::super::{bench, output};
use super::{Options, ops};

fn tell(kind: &str, text: &str) -> Result<()> {
    text.lines().try_for_each(|line| output::print(&format!("{kind}\t{line}\n")))
}

/// Checks, times, and runs the model.
pub(super) fn run(options: &Options, op: &str, library: &str) -> Result<()> {
    let (gpu, stream) = ops::gpu(options)?;
    tell("slow", "preparing data")?;
    let swap = Swap::load(Path::new(library), op)?;
    let (mut wrong, mut declined) = (0, 0);
    let mut checked = calls::calls(op, &stream, false)?;
    for call in &mut checked {
        let finding = checked_with(&swap, call.as_mut(), &stream)?;
        wrong += usize::from(!finding.faults.is_empty());
        tell("say", &ops::shown(&finding))?;
        declined += usize::from(finding.declined);
    }
    if wrong > 0 {
        return tell("end", &format!("{wrong} of {} calls are wrong", checked.len()));
    }
    if declined == checked.len() {
        return tell("end", "it declines every shape");
    }
    let right = checked.len() - declined;
    let but = if declined == 0 { "" } else { "; the built-in kernel takes those it declines too" };
    tell("say", &format!("right, and the same bits twice, in {right} of {} calls{but}", checked.len()))?;
    drop(checked);
    tell("slow", "measuring the GPU")?;
    let ceilings = machine::ceilings(&gpu, &stream)?;
    let mut timer = time::Timer::new(&gpu, &stream)?;
    tell(
        "say",
        &format!(
            "\n{:<44} {:>12} {:>12} {:>10} {:>20}  {}",
            "call, warm us", "built-in", "yours", "time", "95 % interval", "verdict"
        ),
    )?;
    let place = |other: bool| if other { swap.in_place() } else { swap.out() };
    for call in &mut calls::calls(op, &stream, true)? {
        tell("at", &format!("timing {}", call.label()))?;
        call.reset(&stream)?;
        let [plain, other] = match timer.in_turns(&mut |stream| call.launch(stream), &place) {
            Err(Error::Cuda { what, .. }) if what == DECLINED => {
                swap.out();
                tell("say", &format!("{:<44} {:>12} {:>12}", call.label(), "", "declined"))?;
                continue;
            }
            times => times?,
        };
        let found = stats::compare_pairs(&plain, &other, stats::RESOLUTION);
        let floor = call.work().floor_seconds(ceilings.bytes_per_second, ceilings.flop_per_second) * 1e6;
        let line = row(&call.label(), [&plain, &other], found, 1.0);
        tell("say", &format!("{line}, floor {floor:.2} us"))?;
    }
    if options.in_model {
        in_model(options, &gpu, &swap)?;
    }
    tell("end", "right")
}

/// A check whose launches go to the other kernel. The first word of a hang is which call it was.
fn checked_with(swap: &Swap, call: &mut dyn calls::Call, stream: &Stream) -> Result<check::Finding> {
    let label = call.label();
    let mut heard = |stage| match stage {
        check::Stage::Launching => tell("at", &label),
        // The reference may take a slow CPU long.
        check::Stage::Comparing => tell("slow", &format!("comparing {label}")),
    };
    swap.in_place();
    let finding = check::check(call, stream, &mut heard);
    swap.out();
    finding.map_err(|error| match error {
        Error::Cuda { op, what } => Error::Cuda { op: format!("the kernel faults: {op}"), what },
        other => other,
    })
}

fn row(label: &str, times: [&[f64]; 2], found: Comparison, scale: f64) -> String {
    let [plain, other] = times.map(|times| stats::median(times) * scale);
    format!(
        "{label:<44} {plain:>12.2} {other:>12.2} {:>10} {:>20}  {}",
        format!("x {:.4}", found.ratio),
        format!("{:.4} .. {:.4}", found.low, found.high),
        found.verdict.word()
    )
}

/// The whole model with the kernel in it.
fn in_model(options: &Options, gpu: &peregrine::gpu::Gpu, swap: &Swap) -> Result<()> {
    tell("slow", "the whole model")?;
    let checkpoint = bench::checkpoint(&options.model, options.dummy)?;
    let found = model::in_model(&checkpoint, gpu.ordinal(), swap)?;
    tell("say", "\nin the model (decode steps by one kernel an op), us")?;
    for (label, times) in [("a token of an answer", &found.decode), ("a prompt of 128", &found.prompt)] {
        let [plain, other] = times;
        let compared = stats::compare_pairs(plain, other, stats::RESOLUTION);
        tell("say", &row(label, [plain, other], compared, 1e6))?;
    }
    let [plain, other] = [&found.decode[0], &found.decode[1]].map(|times| 1.0 / stats::median(times));
    let (same, all) = found.same_top;
    tell(
        "say",
        &format!(
            "{plain:.1} tokens/s built-in, {other:.1} with yours; logits differ by at most {:.2e}, mean KL {:.1e}, same most likely \
             token at {same} of {all} positions",
            found.worst_logit, found.mean_kl
        ),
    )
}
