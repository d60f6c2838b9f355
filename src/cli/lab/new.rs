//! `lab new`: a folder to begin in.

use std::fs;
use std::path::Path;

use peregrine::error::one_line;
use peregrine::lab;
use peregrine::{Error, Result};

use super::super::output;
use super::known;

/// The rest of a README, after what is the op's own.
const HOW: &str = "\
Edit the .cu file, then

    peregrine lab try OP OP.cu

It is compiled by nvcc, checked against the reference at real shapes and edges, and timed in turns with the built-in
kernel. Nothing of this can harm more than your patience: it runs in a process of its own, with guards around every buffer
and a time limit. When it is right and faster, look at the whole model:

    peregrine lab try OP OP.cu --in-model --load-format dummy

The contract: `extern \"C\" int32_t OP(const ...Params* p, const Launch* l)` of kernels.h copies *p, queues its work on
l->stream, and returns 0, a cudaError_t, or PEREGRINE_BAD_SHAPE for shapes it is not written for, which lab try then leaves out. It does
not wait, print or allocate. launch.cuh says what a kernel owes its neighbours in the stream: wait_previous() before it touches memory.
";

/// Writes the folder.
pub(super) fn new(op: &str, folder: &str) -> Result<()> {
    known(op)?;
    let folder = Path::new(folder);
    let shown = one_line(&folder.display().to_string());
    let fail = |e: std::io::Error| Error::Io(format!("cannot write to {shown}: {e}"));
    if folder.join(format!("{op}.cu")).exists() {
        return Err(Error::Usage(format!("{shown}/{op}.cu exists; give another folder: lab new {op} DIR")));
    }
    fs::create_dir_all(folder).map_err(fail)?;
    let source = lab::source(&format!("{op}.cu")).unwrap_or_default();
    fs::write(folder.join(format!("{op}.cu")), source).map_err(fail)?;
    for (name, text) in lab::headers().chain(lab::parts(op)) {
        fs::write(folder.join(name), text).map_err(fail)?;
    }
    let what = lab::calls::OPS.iter().find(|known| known.0 == op).map_or("", |known| known.1);
    let readme = format!(
        "# {op}\n\n{what}. Shapes, mapping, floor and what was tried stand at the top of {op}.cu.\n\n{HOW}"
    );
    fs::write(folder.join("README.md"), readme.replace("OP", op)).map_err(fail)?;
    output::print(&format!(
        "wrote {shown}/{op}.cu, its headers and a README.md; next: peregrine lab try {op} {shown}/{op}.cu\n"
    ))
}
