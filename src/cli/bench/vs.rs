//! Two programs in turns: each is loaded in a process of its own, and repetitions alternate, so that what drifts (clock,
//! temperature, neighbours) takes both along.
//!
//! A worker is the same command with `--worker`: it says `ready`, then answers each line of stdin, the number of a test, with the
//! seconds of one repetition.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use peregrine::error::one_line;
use peregrine::measure::row::Row;
use peregrine::measure::run::Runner;
use peregrine::measure::stats;
use peregrine::{Error, Result};

use super::super::{interrupt, output};
use super::{Options, compare, load, measure};

/// The worker's side.
pub(super) fn work(options: &Options) -> Result<()> {
    let loaded = load::load(options)?;
    let mut runner = Runner::new(loaded.engine, measure::sampling(options));
    output::print("ready\n")?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::Io(format!("stdin: {e}")))?;
        let test = line.trim().parse::<usize>().ok().and_then(|i| options.tests.get(i));
        let Some(test) = test else { return Err(Error::Usage("a worker is told numbers of tests".into())) };
        let answer = match runner.once(test) {
            Ok(sample) => sample.seconds.to_string(),
            Err(Error::Usage(_)) => "skip".to_owned(),
            Err(error) => return Err(error),
        };
        output::print(&format!("{answer}\n"))?;
    }
    Ok(())
}

/// A program that is being measured.
struct Worker {
    name: String,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Worker {
    fn start(options: &Options, other: Option<&str>) -> Result<Worker> {
        let here =
            std::env::current_exe().map_err(|e| Error::Io(format!("cannot find this program: {e}")))?;
        let settings = other.filter(|other| other.contains('='));
        let program = match other {
            Some(path) if settings.is_none() => path.into(),
            _ => here,
        };
        let name = other.map_or("this".to_owned(), one_line);
        let mut command = Command::new(&program);
        command.arg("bench").args(without_vs(&options.words)).arg("--worker");
        for pair in settings.into_iter().flat_map(|s| s.split(',')) {
            let (variable, value) = pair.split_once('=').unwrap_or((pair, ""));
            command.env(variable, value);
        }
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|e| {
            Error::Usage(format!("--vs: cannot run {}: {e}", one_line(&program.display().to_string())))
        })?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = (stdin, stdout) else {
            return Err(Error::Io("a worker has no pipes".into()));
        };
        let mut worker = Worker { name, child, stdin, stdout: BufReader::new(stdout) };
        match worker.answer()?.as_str() {
            "ready" => Ok(worker),
            other => Err(Error::Io(format!("worker {} said '{}'", worker.name, one_line(other)))),
        }
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        let read =
            self.stdout.read_line(&mut line).map_err(|e| Error::Io(format!("worker {}: {e}", self.name)))?;
        if read == 0 {
            return Err(Error::Io(format!("worker {} ended; what it said is above", self.name)));
        }
        Ok(line.trim().to_owned())
    }

    /// Seconds of a repetition of test `index`; `None`: it does not fit the model.
    fn once(&mut self, index: usize) -> Result<Option<f64>> {
        let asked = writeln!(self.stdin, "{index}").and_then(|()| self.stdin.flush());
        asked.map_err(|e| Error::Io(format!("worker {}: {e}", self.name)))?;
        let answer = self.answer()?;
        match answer.as_str() {
            "skip" => Ok(None),
            seconds => seconds.parse().map(Some).map_err(|_| {
                Error::Io(format!("worker {} said '{}', wanted seconds", self.name, one_line(&answer)))
            }),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has nothing to lose, and must not outlive this process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The words without what only the parent does.
fn without_vs(words: &[std::ffi::OsString]) -> Vec<std::ffi::OsString> {
    let mut kept = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        if ["--vs", "--save", "--compare", "--plot", "-o", "--output"].contains(&text.as_ref()) {
            words.next();
        } else if text != "--breakdown" && !["--vs=", "--output="].iter().any(|start| text.starts_with(start))
        {
            kept.push(word.clone());
        }
    }
    kept
}

/// Runs this program and the other in turns, and prints the comparison.
pub(super) fn run(options: &Options, other: &str) -> Result<()> {
    let mut workers = [Worker::start(options, None)?, Worker::start(options, Some(other))?];
    let watch = interrupt::watch();
    let mut compared = Vec::new();
    for (index, test) in options.tests.iter().enumerate() {
        let mut seconds = [Vec::new(), Vec::new()];
        // The first round does not count; who begins alternates.
        for round in 0..=options.repetitions {
            for turn in 0..2 {
                watch.check()?;
                let which = (round + turn) % 2;
                if let Some(time) = workers[which].once(index)?
                    && round > 0
                {
                    seconds[which].push(time);
                }
            }
        }
        let [first, second] = seconds;
        if first.is_empty() || first.len() != second.len() {
            options.model.say(&format!("skipped {}: it needs more positions", test.name()));
            continue;
        }
        let mut row = Row::default();
        for (name, count) in [
            ("n_prompt", test.prompt),
            ("n_gen", test.generate),
            ("n_depth", test.depth),
            ("n_seqs", test.texts),
        ] {
            row.set(name, count);
        }
        let tokens = (test.texts * test.prompt.max(test.generate)) as f64;
        let rate = |seconds: &[f64]| tokens / stats::median(seconds);
        compared.push((
            row,
            rate(&first),
            rate(&second),
            stats::compare_pairs(&first, &second, options.resolution),
        ));
    }
    let lines: Vec<_> =
        compared.iter().map(|(row, first, second, found)| (row, *first, *second, *found)).collect();
    output::print(&compare::lines(&lines, ["this", "other"]))?;
    output::print(&format!("other: {}\n", workers[1].name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_gets_the_tests_and_not_the_comparison() {
        let words =
            ["-p", "8", "--vs", "x=1", "--breakdown", "--vs=y", "-o", "md", "-r", "2"].map(Into::into);
        assert_eq!(without_vs(&words), ["-p", "8", "-r", "2"].map(std::ffi::OsString::from));
    }
}
