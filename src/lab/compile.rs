//! A kernel file to a library that exports its launcher: `nvcc -shared`, against the headers of this very program.
//!
//! A launcher is host code, so the compiler must be one for both. NVRTC compiles device code alone, and like nvcc it comes with the
//! toolkit, not with the driver: who could have it can have nvcc. So there is no other way in, and who has no nvcc is told the one command
//! that fetches it, without root; or gives a library that was built elsewhere.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::error::{Error, Result, one_line};

/// Where nvcc is: `$NVCC`, `$CUDA_HOME/bin`, the PATH, `.cuda/` of the working folder, `/usr/local/cuda`.
#[must_use]
pub fn nvcc() -> Option<PathBuf> {
    tool("nvcc")
}

/// A program of the CUDA toolkit.
#[must_use]
pub fn tool(name: &str) -> Option<PathBuf> {
    let mut candidates = Vec::new();
    if let Some(nvcc) = env::var_os("NVCC").map(PathBuf::from) {
        candidates.push(if name == "nvcc" { nvcc } else { nvcc.with_file_name(name) });
    }
    if let Some(home) = env::var_os("CUDA_HOME") {
        candidates.push(PathBuf::from(home).join("bin").join(name));
    }
    if let Some(path) = env::var_os("PATH") {
        candidates.extend(env::split_paths(&path).map(|folder| folder.join(name)));
    }
    candidates.push(PathBuf::from(".cuda/nvidia/cu13/bin").join(name));
    candidates.push(PathBuf::from("/usr/local/cuda/bin").join(name));
    candidates.into_iter().find(|path| path.is_file())
}

/// The command that fetches nvcc to where [`nvcc`] looks for it: the wheels this program was built with.
#[must_use]
pub fn fetch() -> String {
    let wheels = include_str!("../../scripts/nvcc.txt").lines().filter(|line| !line.starts_with('#'));
    let wheels: Vec<&str> = wheels.filter_map(|line| line.split_whitespace().next()).collect();
    format!("python3 -m pip install --no-deps --target .cuda {}", wheels.join(" "))
}

/// A library that was made, and what ptxas said of its kernels.
pub struct Compiled {
    /// The library.
    pub library: PathBuf,
    /// Registers and spills, as ptxas prints them.
    pub ptxas: String,
}

/// Compiles `file`, which exports the launcher of `op`, into `folder`, for a GPU of `capability` (90: Hopper). Headers are searched beside
/// the file, then in the folder, where those of this program are written. The op's [`parts`](super::parts) are compiled with it where
/// they lie beside it.
///
/// # Errors
/// [`Error::Usage`] if there is no nvcc, or with what it said if it refuses the file.
pub fn compile(op: &str, file: &Path, folder: &Path, capability: i32) -> Result<Compiled> {
    let shown = one_line(&file.display().to_string());
    let Some(nvcc) = nvcc() else {
        return Err(Error::Usage(format!(
            "no nvcc to compile {shown} with: set NVCC or CUDA_HOME, or fetch it into this folder: {}; or give a library that was built \
             elsewhere",
            fetch()
        )));
    };
    let io = |what: &str, e: std::io::Error| Error::Io(format!("{what}: {e}"));
    for (name, text) in super::headers() {
        fs::write(folder.join(name), text).map_err(|e| io("cannot write a header", e))?;
    }
    let library = folder.join("kernel.so");
    // Hopper's own instructions are those of the target with an a.
    let arch = if capability == 90 { "90a".to_owned() } else { capability.to_string() };
    let mut command = Command::new(&nvcc);
    command
        .args([
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-shared",
            "-Xptxas=-v",
            "-Xcompiler=-fPIC",
            "-cudart=static",
        ])
        .arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"))
        .arg("-I")
        .arg(folder)
        .arg(file)
        .args(super::parts(op).map(|(name, _)| file.with_file_name(name)).filter(|part| part.is_file()))
        // A launcher that calls what is not there would else be noticed by a crash.
        .arg("-Xlinker=--no-undefined")
        .arg("-o")
        .arg(&library);
    // What the toolkit in wheels keeps in lib/ and nvcc looks for in lib64/.
    if let Some(home) = fs::canonicalize(&nvcc).ok().as_deref().and_then(Path::parent).and_then(Path::parent)
    {
        command.arg("-L").arg(home.join("lib"));
    }
    let output = command.output().map_err(|e| io("cannot run nvcc", e))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(Compiled { library, ptxas: said });
    }
    let errors: Vec<&str> =
        said.lines().filter(|line| line.contains("error") || line.contains("undefined")).take(5).collect();
    let first = if errors.is_empty() { said.lines().take(5).collect() } else { errors };
    Err(Error::Usage(format!("nvcc refuses {shown}: {}", one_line(&first.join("; ")))))
}
