//! `peregrine lab`, and the ops' calls it is made of. What needs a GPU is skipped, loudly, where there is none.
#![cfg(all(feature = "cuda", feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "common/gpu.rs"]
mod gpu;

use std::process::Command;

use gpu::gpu;
use peregrine::gpu::{DevBuf, Gpu};
use peregrine::lab::{calls, check};

/// Runs the program: status, stdout, stderr.
fn lab(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_peregrine")).arg("lab").args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn every_call_is_right() {
    let Some((_, stream)) = gpu() else { return };
    for (op, _) in calls::OPS {
        for call in &mut calls::own_calls(op, &stream, false).unwrap() {
            let finding = check::check(call.as_mut(), &stream, &mut |_| Ok(())).unwrap();
            for line in &finding.measured {
                eprintln!("MEASURED {}: {line}", finding.label);
            }
            assert!(finding.faults.is_empty(), "{finding:?}");
        }
    }
}

#[test]
fn a_guarded_buffer_sees_who_walks_on_its_guards() {
    let Some((_, stream)) = gpu() else { return };
    let buffer = DevBuf::guarded(&stream, "buffer", &[1.0f32, 2.0, 3.0]).unwrap();
    assert_eq!(buffer.len(), 3);
    assert_eq!(buffer.download(&stream, 1, 2).unwrap(), [2.0, 3.0]);
    assert!(buffer.download(&stream, 1, 3).is_err());
    assert_eq!(buffer.trespass(&stream).unwrap(), None);
}

/// A stranger's kernel is accepted when it is right, and what is wrong with others is said.
#[test]
fn kernels_of_strangers_are_tried() {
    let Some(_) = gpu() else { return };
    if peregrine::lab::compile::nvcc().is_none() {
        eprintln!("SKIPPED kernels_of_strangers_are_tried: no nvcc");
        return;
    }
    let file = |name: &str| format!("{}/tests/kernels/layernorm_{name}.cu", env!("CARGO_MANIFEST_DIR"));
    let (code, out, err) = lab(&["try", "layernorm", &file("good")]);
    assert_eq!(code, 0, "{out}{err}");
    for (name, words) in [
        ("off_by_one", &["not accepted", "wrong"][..]),
        ("overruns", &["not accepted"]),
        ("hangs", &["hangs", "layernorm [1, 64]"]),
        ("faults", &["layernorm [1, 64]", "the kernel faults", "ILLEGAL_ADDRESS"]),
    ] {
        let (code, out, err) = lab(&["try", "layernorm", &file(name), "--time-limit", "5"]);
        assert_eq!(code, 1, "{name}: {out}{err}");
        assert!(words.iter().all(|word| err.contains(word)), "{name}: {out}{err}");
        assert!(name != "overruns" || out.contains("behind its end"), "{out}");
        assert!(name != "off_by_one" || out.contains("value 63"), "{out}");
    }
}

/// Needs nvcc, which builds the program too, and no GPU.
#[test]
fn a_kernel_file_becomes_a_library() {
    use peregrine::gpu::swap::Swap;
    use peregrine::lab::{compile, report};
    if compile::nvcc().is_none() {
        eprintln!("SKIPPED a_kernel_file_becomes_a_library: no nvcc");
        return;
    }
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab-compile");
    std::fs::create_dir_all(&folder).unwrap();
    let file = format!("{}/tests/kernels/layernorm_good.cu", env!("CARGO_MANIFEST_DIR"));
    let compiled = compile::compile("layernorm", file.as_ref(), &folder, 90).unwrap();
    let kernels = report::kernels(&compiled.ptxas);
    assert_eq!(kernels.len(), 1, "{}", compiled.ptxas);
    assert_eq!((kernels[0].name.as_str(), kernels[0].spill_bytes), ("newcomer_kernel", 0));
    assert!(Swap::load(&compiled.library, "layernorm").is_ok());
    let missing = Swap::load(&compiled.library, "rope").err().map(|e| e.to_string()).unwrap();
    assert!(missing.contains("rope") && missing.contains("no launcher"), "{missing}");
    // Who has no nvcc is told this, with the wheels this program is built with.
    let fetch = compile::fetch();
    assert!(
        fetch.contains("--target .cuda nvidia-cuda-nvcc==13.") && fetch.contains(" nvidia-nvvm==13."),
        "{fetch}"
    );
    let broken = folder.join("broken.cu");
    std::fs::write(&broken, "#include \"launch.cuh\"\nthis is no kernel\n").unwrap();
    let refused = compile::compile("layernorm", &broken, &folder, 90).err().map(|e| e.to_string()).unwrap();
    assert!(refused.contains("nvcc refuses") && refused.contains("error"), "{refused}");
}

/// A stand-in for a profiler's library hears of each repetition.
#[test]
fn a_profiler_is_told_the_ranges() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvtx");
    std::fs::create_dir_all(&folder).unwrap();
    let (source, library) = (folder.join("listener.c"), folder.join("listener.so"));
    let listener = r#"
        #include <stdint.h>
        #include <stdio.h>
        typedef const void* (*Export)(uint32_t);
        struct Callbacks { size_t bytes; int (*module)(unsigned, void*** *, unsigned*); };
        static int push(const char* name) { fprintf(stderr, "push %s\n", name); return 0; }
        static int pop(void) { fprintf(stderr, "pop\n"); return 0; }
        int InitializeInjectionNvtx2(Export export) {
            const struct Callbacks* callbacks = export(1);
            const struct { size_t bytes; uint32_t version, reserved; void (*set)(uint32_t); } *versions = export(3);
            const unsigned sizes[7] = {0, 16, 9, 15, 7, 16, 7};
            if (!versions || versions->bytes != sizeof *versions || versions->version != 3) return 0;
            versions->set(3);
            void*** table = 0;
            unsigned size = 0;
            if (!callbacks || !callbacks->module(1, &table, &size) || callbacks->module(7, 0, 0)) return 0;
            for (unsigned m = 1; m < 7; m++) {
                void*** other = 0;
                if (!callbacks->module(m, &other, &size) || size != sizes[m] || other[0] || other[size]) return 0;
                for (unsigned i = 1; i < size; i++) *other[i] = 0;
            }
            *table[9] = (void*)push;
            *table[11] = (void*)pop;
            return 1;
        }
    "#;
    std::fs::write(&source, listener).unwrap();
    let made = Command::new("gcc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED a_profiler_is_told_the_ranges: no gcc");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_peregrine"))
        .args([
            "bench",
            "--load-format",
            "dummy",
            "-m",
            "tiny",
            "--device",
            "cpu",
            "-p",
            "4",
            "-n",
            "2",
            "-r",
            "1",
        ])
        .env("NVTX_INJECTION64_PATH", &library)
        .output()
        .unwrap();
    let heard = String::from_utf8_lossy(&output.stderr).into_owned();
    let told: Vec<&str> = heard.lines().filter(|line| line.starts_with("push") || *line == "pop").collect();
    assert_eq!(told, ["push pp4", "pop", "push pp4", "pop", "push tg2", "pop", "push tg2", "pop"], "{heard}");
}

#[test]
fn without_a_gpu_the_lab_says_so_in_one_line() {
    let here = Gpu::open(0).is_ok();
    let file = format!("{}/tests/kernels/layernorm_good.cu", env!("CARGO_MANIFEST_DIR"));
    for args in [&["check"][..], &["bench", "rope"], &["try", "layernorm", &file]] {
        if here {
            eprintln!("SKIPPED without_a_gpu_the_lab_says_so_in_one_line: this machine has a GPU");
            return;
        }
        let (code, out, err) = lab(args);
        assert_eq!((code, out.as_str()), (3, ""), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

#[test]
fn what_needs_no_gpu_works_without_one() {
    let (code, out, err) = lab(&["list"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("gptq_gemv") && out.contains("floor us"), "{out}");
    let (code, out, err) = lab(&["report", "layernorm"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("layernorm_kernel<1, 1, 4>") && out.contains("registers"), "{out}");
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab-new");
    let _ = std::fs::remove_dir_all(&folder);
    let (code, _, err) = lab(&["new", "layernorm", folder.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    for file in ["layernorm.cu", "kernels.h", "launch.cuh", "README.md"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let readme = std::fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(readme.contains("peregrine lab try layernorm layernorm.cu"), "{readme}");
    // A second one would overwrite work.
    assert_eq!(lab(&["new", "layernorm", folder.to_str().unwrap()]).0, 2);
}

#[test]
fn wrong_usage_is_refused() {
    for (args, word) in [
        (&["chekc"][..], "check"),
        (&["check", "layernrom"], "layernorm"),
        (&["try", "layernorm", "no-such-file.cu"], "no-such-file.cu"),
        (&["try", "layernorm"], "FILE"),
        (&["new"], "OP"),
        (&["check", "rope", "embed"], "one OP"),
        (&["bench", "rope", "--save", "no/such/folder/x.json"], "no such folder"),
        (&["check", "--time-limit", "-1"], "time-limit"),
        (&["report", "nothing"], "layernorm"),
    ] {
        let (code, _, err) = lab(args);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(err.contains(word) && err.lines().count() == 1, "{args:?}: {err}");
    }
}
