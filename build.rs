//! Compiles `cuda/*.cu` with nvcc and turns `cuda/kernels.h` and `cuda/probes.h` into Rust. Without the feature `cuda` it does nothing.
//!
//! - nvcc is `$NVCC`, or in `$CUDA_HOME/bin`, on the PATH, or where `make cuda` puts it (`.cuda/`).
//! - Each `.cu` is an object of its own and is compiled again only when it, a header that it includes or the flags changed.
//! - `PEREGRINE_CUDA_ARCH` (for example `90a` or `80,90a`) overrides the targets sm_80 and sm_90a.
//! - What ptxas says of registers and spills lies in `$OUT_DIR/<op>.ptxas.txt`.
//! - `cfg(peregrine_sm90)` is set when there is machine code for sm_90: only that has programmatic dependent launch, not the
//!   PTX that other GPUs run.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(peregrine_sm90)");
    name_commit();
    #[cfg(feature = "cuda")]
    if let Err(message) = cuda::build() {
        println!("cargo:warning={message}");
        eprintln!("error: {message}");
        std::process::exit(1);
    }
}

/// `PEREGRINE_COMMIT`, for records of `peregrine bench`: the commit, with a `+` if files differed from it when it was asked for. Unset
/// outside a git checkout.
fn name_commit() {
    if !std::path::Path::new(".git").exists() {
        return;
    }
    let git =
        std::process::Command::new("git").args(["describe", "--always", "--dirty=+", "--exclude=*"]).output();
    let Ok(said) = git else { return };
    let commit = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    if said.status.success() && !commit.is_empty() {
        println!("cargo:rustc-env=PEREGRINE_COMMIT={commit}");
    }
    // Written at each commit and checkout; elsewhere than in .git/ in a second worktree.
    let log = std::process::Command::new("git").args(["rev-parse", "--git-path", "logs/HEAD"]).output();
    let log = log.map_or(String::new(), |said| String::from_utf8_lossy(&said.stdout).trim().to_owned());
    if !log.is_empty() && std::path::Path::new(&log).exists() {
        println!("cargo:rerun-if-changed={log}");
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::collections::BTreeMap;
    use std::collections::hash_map::DefaultHasher;
    use std::env;
    use std::fs;
    use std::hash::{Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::process::Command;

    type Result<T> = std::result::Result<T, String>;

    /// sm_80 runs on every GPU from Ampere on, sm_90a is tuned for Hopper; the PTX covers what comes later.
    const DEFAULT_ARCHS: &str = "80,90a";
    const REMEDY: &str = "run `make cuda` to get it, set CUDA_HOME, or build without the GPU: `cargo build --no-default-features --features cli,demo`";

    pub(crate) fn build() -> Result<()> {
        for variable in ["NVCC", "CUDA_HOME", "PEREGRINE_CUDA_ARCH", "PEREGRINE_CUDA_ARCHS", "LIBCLANG_PATH"]
        {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        if env::var_os("PEREGRINE_CUDA_ARCHS").is_some() {
            return Err(
                "PEREGRINE_CUDA_ARCHS is not a name we know: PEREGRINE_CUDA_ARCH takes several, e.g. 80,90a"
                    .into(),
            );
        }
        println!("cargo:rerun-if-changed=cuda");
        let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?);
        let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
        let nvcc = find_nvcc(&root)?;
        bind(&root, &out)?;
        let objects = compile(&root, &out, &nvcc)?;
        embed(&root, &out)?;
        cc::Build::new().objects(&objects).cargo_metadata(true).compile("peregrine_kernels");
        link_runtime(&nvcc)?;
        Ok(())
    }

    fn find_nvcc(root: &Path) -> Result<PathBuf> {
        let mut candidates = Vec::new();
        if let Some(nvcc) = env::var_os("NVCC") {
            candidates.push(PathBuf::from(nvcc));
        }
        if let Some(home) = env::var_os("CUDA_HOME") {
            candidates.push(PathBuf::from(home).join("bin/nvcc"));
        }
        if let Some(path) = env::var_os("PATH") {
            candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
        }
        candidates.push(root.join(".cuda/nvidia/cu13/bin/nvcc"));
        candidates.into_iter().find(|nvcc| nvcc.is_file()).ok_or(format!("no nvcc found: {REMEDY}"))
    }

    /// The gencode flags: machine code for each target, PTX of the first for GPUs newer than all of them.
    fn targets() -> Result<Vec<String>> {
        let list = env::var("PEREGRINE_CUDA_ARCH").unwrap_or_else(|_| DEFAULT_ARCHS.into());
        let archs: Vec<&str> = list.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
        let valid = |a: &str| a.trim_end_matches(['a', 'f']).parse::<u32>().is_ok_and(|n| n >= 80);
        match archs.iter().find(|a| !valid(a)) {
            Some(bad) => {
                return Err(format!(
                    "PEREGRINE_CUDA_ARCH: `{bad}` is no target from 80 on; wanted e.g. 80,90a"
                ));
            }
            None if archs.contains(&"90") => {
                return Err(
                    "PEREGRINE_CUDA_ARCH: `90` leaves out the tensor cores' wgmma, which kernels use there; wanted 90a"
                        .into(),
                );
            }
            None if archs.is_empty() => return Err("PEREGRINE_CUDA_ARCH is empty; wanted e.g. 80,90a".into()),
            None => {}
        }
        let mut flags: Vec<String> =
            archs.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")).collect();
        if archs.iter().any(|a| a.trim_end_matches('a') == "90") {
            println!("cargo:rustc-cfg=peregrine_sm90");
        }
        if !archs[0].ends_with(['a', 'f']) {
            flags.push(format!("-gencode=arch=compute_{0},code=compute_{0}", archs[0]));
        }
        Ok(flags)
    }

    /// Compiles what is out of date, on as many threads as cargo allows; gives all objects.
    fn compile(root: &Path, out: &Path, nvcc: &Path) -> Result<Vec<PathBuf>> {
        let mut flags: Vec<String> =
            "-std=c++17 -O3 -lineinfo -Xptxas=-v -Xcompiler=-fPIC,-fno-exceptions,-fno-threadsafe-statics"
                .split(' ')
                .map(Into::into)
                .collect();
        flags.extend(targets()?);

        let mut sources: Vec<PathBuf> = fs::read_dir(root.join("cuda"))
            .and_then(|dir| dir.map(|entry| entry.map(|e| e.path())).collect())
            .map_err(|e| format!("cuda/: {e}"))?;
        sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
        sources.sort();
        let common = (&flags, nvcc.to_path_buf());

        let mut stale = Vec::new();
        let mut objects = Vec::new();
        for source in sources {
            let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let files = with_headers(&source)?;
            let mut hash = DefaultHasher::new();
            (&common, &files).hash(&mut hash);
            let stamp = format!("{:016x}", hash.finish());
            let object = out.join(format!("{name}.o"));
            let stamp_file = out.join(format!("{name}.stamp"));
            if !object.is_file() || fs::read_to_string(&stamp_file).unwrap_or_default() != stamp {
                let bytes: usize = files.values().map(Vec::len).sum();
                stale.push((bytes, source, name, object.clone(), stamp_file, stamp));
            }
            objects.push(object);
        }
        // Taken from the end: what takes long is begun first.
        stale.sort();
        let jobs = env::var("NUM_JOBS").ok().and_then(|j| j.parse().ok()).unwrap_or(1usize).max(1);
        let queue = std::sync::Mutex::new(stale);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs)
                .map(|_| {
                    scope.spawn(|| -> Result<()> {
                        loop {
                            let job = queue.lock().map_err(|e| e.to_string())?.pop();
                            let Some((_, source, name, object, stamp_file, stamp)) = job else {
                                return Ok(());
                            };
                            compile_one(
                                nvcc,
                                &flags,
                                &source,
                                &object,
                                &out.join(format!("{name}.ptxas.txt")),
                            )?;
                            fs::write(&stamp_file, stamp).map_err(|e| e.to_string())?;
                        }
                    })
                })
                .collect();
            workers
                .into_iter()
                .try_for_each(|w| w.join().map_err(|_| "a compile thread panicked".to_string())?)
        })?;
        Ok(objects)
    }

    /// A source and the headers of ours that it includes, by way of others too: what its object is made of.
    fn with_headers(source: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let mut files = BTreeMap::new();
        let mut wanted = vec![source.to_path_buf()];
        while let Some(path) = wanted.pop() {
            if files.contains_key(&path) {
                continue;
            }
            let bytes = read(&path)?;
            let text = String::from_utf8_lossy(&bytes);
            let named = text.lines().filter_map(|line| line.trim_start().strip_prefix("#include \""));
            wanted.extend(named.filter_map(|rest| Some(path.with_file_name(rest.split_once('"')?.0))));
            files.insert(path, bytes);
        }
        Ok(files)
    }

    /// `$OUT_DIR/sources.rs`: the text of every file of `cuda/`, and of what ptxas said of it, for `peregrine lab`.
    fn embed(root: &Path, out: &Path) -> Result<()> {
        let list = |folder: &Path, ends: &[&str]| -> Result<Vec<(String, PathBuf)>> {
            let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
            let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
            let named = paths.map(|p| (p.file_name().unwrap_or_default().to_string_lossy().into_owned(), p));
            let mut found: Vec<_> =
                named.filter(|(name, _)| ends.iter().any(|end| name.ends_with(end))).collect();
            found.sort();
            Ok(found)
        };
        let mut files = list(&root.join("cuda"), &[".cu", ".cuh", ".h"])?;
        let kernels: Vec<String> =
            files.iter().filter_map(|(name, _)| name.strip_suffix(".cu").map(Into::into)).collect();
        let reports = list(out, &[".ptxas.txt"])?;
        // One of a kernel that is no more may lie there.
        files.extend(reports.into_iter().filter(|(name, _)| {
            name.strip_suffix(".ptxas.txt").is_some_and(|kernel| kernels.iter().any(|k| k == kernel))
        }));
        let rows = files
            .iter()
            .map(|(name, path)| format!("({name:?}, include_str!({:?})),", path.display().to_string()));
        let text = format!("static SOURCES: &[(&str, &str)] = &[{}];\n", rows.collect::<String>());
        let file = out.join("sources.rs");
        // Not touched if it is the same, as a file that is newer compiles the library again.
        if fs::read_to_string(&file).unwrap_or_default() != text {
            fs::write(&file, text).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn read(path: &Path) -> Result<Vec<u8>> {
        fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn compile_one(nvcc: &Path, flags: &[String], source: &Path, object: &Path, report: &Path) -> Result<()> {
        let output = Command::new(nvcc)
            .args(flags)
            .arg("-c")
            .arg(source)
            .arg("-o")
            .arg(object)
            .output()
            .map_err(|e| format!("{}: {e}: {REMEDY}", nvcc.display()))?;
        let text = String::from_utf8_lossy(&output.stderr);
        fs::write(report, text.as_bytes()).map_err(|e| e.to_string())?;
        if output.status.success() {
            return Ok(());
        }
        eprintln!("{}{text}", String::from_utf8_lossy(&output.stdout));
        Err(format!("nvcc could not compile {}", source.display()))
    }

    /// The static CUDA runtime: the program then needs the driver alone, and that only when it uses the GPU.
    fn link_runtime(nvcc: &Path) -> Result<()> {
        let real = fs::canonicalize(nvcc).map_err(|e| e.to_string())?;
        let home = real.parent().and_then(Path::parent).ok_or("nvcc lies in no toolkit")?;
        let folders = ["lib64", "lib", "targets/x86_64-linux/lib"];
        let folder = folders.iter().map(|f| home.join(f)).find(|f| f.join("libcudart_static.a").is_file());
        let folder = folder.ok_or(format!("no libcudart_static.a beside {}: {REMEDY}", nvcc.display()))?;
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static=cudart_static");
        for library in ["rt", "dl", "pthread"] {
            println!("cargo:rustc-link-lib=dylib={library}");
        }
        Ok(())
    }

    /// `cuda/kernels.h` and `cuda/probes.h` -> `$OUT_DIR/kernels.rs`.
    #[allow(unsafe_code)] // set_var
    fn bind(root: &Path, out: &Path) -> Result<()> {
        let wheel = root.join(".cuda/clang/native");
        if env::var_os("LIBCLANG_PATH").is_none() && wheel.join("libclang.so").is_file() {
            // SAFETY: this program is still single-threaded: `build` calls `bind` before `compile` starts any thread.
            unsafe { env::set_var("LIBCLANG_PATH", wheel) };
        }
        // libclang from a wheel has no headers of its own; the host compiler's will do for <stdint.h>.
        let include = Command::new("gcc").arg("-print-file-name=include").output();
        let include =
            include.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
        // bindgen panics when there is no libclang; the sentence below says it better than the panic's message.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let made = std::panic::catch_unwind(|| {
            bindgen::Builder::default()
                .header(root.join("cuda/probes.h").to_string_lossy()) // and with it kernels.h
                .clang_arg(format!("-isystem{include}"))
                .allowlist_file(".*/(kernels|probes)\\.h")
                .derive_default(true)
                .derive_debug(false)
                .layout_tests(true)
                .generate()
        });
        std::panic::set_hook(hook);
        match made {
            Ok(Ok(bindings)) => bindings.write_to_file(out.join("kernels.rs")).map_err(|e| e.to_string()),
            Ok(Err(e)) => Err(format!("cuda/kernels.h, cuda/probes.h: {e}")),
            Err(_) => Err(format!("bindgen found no libclang: {REMEDY}")),
        }
    }
}
