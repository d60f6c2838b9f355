//! `peregrine logits`: the logits of every position of a text, for comparison with another implementation.
//!
//! The file is .safetensors with `ids` i32 [n] and `logits` f32 [n, vocab], row i being the logits after token i.
//! Rows go to disk as they are computed (n x 260 KB for Falcon-7B); the file appears under its name when complete.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use peregrine::error::one_line;
use peregrine::{Error, Result};

use super::args::{Args, Word};
use super::interrupt;
use super::model::{self, ModelFlags};
use super::prompt::{self, Prompt, PromptFlags};

pub(super) const HELP: &[&str] = &[
    "\
Writes the logits of every position of a text to a .safetensors file: ids i32 [n], logits f32 [n, vocab].
The text is taken as it is, without template.

Usage: peregrine logits [-m MODEL] [-p TEXT | -f FILE | --ids FILE] [--decode] -o OUT.safetensors

  -o, --output FILE         the file to write
      --decode              token by token, as when generating, instead of all at once
",
    prompt::HELP,
    model::HELP,
];

/// Runs the command.
pub(super) fn run(mut args: Args) -> Result<()> {
    let mut model = ModelFlags::new();
    let mut prompt = PromptFlags::default();
    let mut decode = false;
    let mut output: Option<PathBuf> = None;
    while let Some(word) = args.next()? {
        match word {
            Word::Option(option) if option == "-h" || option == "--help" => return args.print_help(),
            Word::Option(option) if option == "--decode" => decode = true,
            Word::Option(option) if option == "-o" || option == "--output" => output = Some(args.path()?),
            Word::Option(option) if model.take(&option, &mut args)? || prompt.take(&option, &mut args)? => {}
            other => return Err(args.unknown(other)),
        }
    }
    let output = output.ok_or_else(|| args.wrong("no file to write: give -o OUT.safetensors"))?;
    interrupt::install()?;
    let prompt_text = prompt.read()?;
    let engine = model.load()?;
    let ids = match prompt_text {
        Prompt::Ids(ids) => ids,
        Prompt::Text(text) => engine.tokenizer()?.encode(&text, prompt.special)?,
    };
    let mut session = model.session(&engine)?;

    let watch = interrupt::watch();
    let start = Instant::now();
    let mut file: Option<LogitsFile> = None;
    session.logits(&ids, decode, &mut |row| {
        watch.check()?;
        // Created with the first row: a prompt that is refused leaves no file behind.
        if file.is_none() {
            file = Some(LogitsFile::create(&output, &ids, engine.config().vocab_size)?);
        }
        file.as_mut().map_or(Ok(()), |file| file.write_row(row))
    })?;
    let bytes = file.map_or(Ok(0), LogitsFile::finish)?;
    model.say(&format!(
        "wrote {}: {} positions, {:.1} MB, {} in {:.2} s on {}",
        one_line(&output.display().to_string()),
        ids.len(),
        bytes as f64 / 1e6,
        if decode { "token by token" } else { "one pass" },
        start.elapsed().as_secs_f64(),
        engine.device_name()
    ));
    Ok(())
}

/// A logits file being written under a temporary name beside its own.
struct LogitsFile {
    writer: BufWriter<File>,
    temporary: PathBuf,
    output: PathBuf,
    vocab: usize,
    rows_left: usize,
    bytes: u64,
    /// One row as little-endian bytes.
    row: Vec<u8>,
}

impl LogitsFile {
    fn create(output: &Path, ids: &[u32], vocab: usize) -> Result<LogitsFile> {
        let mut name = output.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = output.with_file_name(name);
        let file = File::create(&temporary).map_err(|error| write_error(output, &error))?;
        let mut this = LogitsFile {
            writer: BufWriter::with_capacity(1 << 20, file),
            temporary,
            output: output.to_path_buf(),
            vocab,
            rows_left: ids.len(),
            bytes: 0,
            row: Vec::with_capacity(vocab * 4),
        };
        this.write(&header(ids.len(), vocab))?;
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        this.write(&ids)?;
        Ok(this)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.writer.write_all(bytes).map_err(|error| write_error(&self.output, &error))
    }

    fn write_row(&mut self, logits: &[f32]) -> Result<()> {
        if logits.len() != self.vocab || self.rows_left == 0 {
            let what = format!("logits: got a row of {} with {} rows to come", logits.len(), self.rows_left);
            return Err(Error::Io(format!("{what}, wanted {} values: a defect of this program", self.vocab)));
        }
        self.rows_left -= 1;
        let mut row = std::mem::take(&mut self.row);
        row.clear();
        row.extend(logits.iter().flat_map(|logit| logit.to_le_bytes()));
        let written = self.write(&row);
        self.row = row;
        written
    }

    /// Gives the complete file its name; returns its size in bytes.
    fn finish(mut self) -> Result<u64> {
        if self.rows_left != 0 {
            return Err(Error::Io(format!(
                "logits: {} rows are missing: a defect of this program",
                self.rows_left
            )));
        }
        self.writer
            .flush()
            .and_then(|()| fs::rename(&self.temporary, &self.output))
            .map_err(|error| write_error(&self.output, &error))?;
        Ok(self.bytes)
    }
}

impl Drop for LogitsFile {
    fn drop(&mut self) {
        // After `finish` the name is gone already; before it, half a file is of no use to anyone.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn write_error(output: &Path, error: &io::Error) -> Error {
    Error::Io(format!("cannot write {}: {error}", one_line(&output.display().to_string())))
}

/// The safetensors header: its length as u64, then JSON padded with blanks to 8 bytes, as the format asks.
fn header(n: usize, vocab: usize) -> Vec<u8> {
    let (ids_end, logits_end) = (n as u64 * 4, n as u64 * 4 + n as u64 * vocab as u64 * 4);
    let mut json = serde_json::json!({
        "ids": { "dtype": "I32", "shape": [n], "data_offsets": [0, ids_end] },
        "logits": { "dtype": "F32", "shape": [n, vocab], "data_offsets": [ids_end, logits_end] },
    })
    .to_string()
    .into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}
