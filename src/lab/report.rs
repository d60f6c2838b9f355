//! Registers, shared memory, spills and occupancy of each kernel, from what ptxas said when it was compiled.

use std::fmt::Write;

/// Of a multiprocessor of compute capability 8.0 and 9.0.
const REGISTERS: usize = 65_536;
const WARPS: usize = 64;
/// Registers are given out in steps of this many a warp.
const REGISTER_STEP: usize = 256;
/// Warps have room in steps of one a scheduler.
const SCHEDULERS: usize = 4;

/// What ptxas said of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Its name, unmangled as far as it goes.
    pub name: String,
    /// `sm_90a`.
    pub target: String,
    /// Registers a thread.
    pub registers: usize,
    /// Static shared memory of a block, bytes.
    pub shared_bytes: usize,
    /// Bytes of stack a thread.
    pub stack_bytes: usize,
    /// Bytes that are stored because registers run out.
    pub spill_bytes: usize,
}

impl Kernel {
    /// Warps a multiprocessor has registers for.
    #[must_use]
    pub fn warps_by_registers(&self) -> usize {
        let warp = (self.registers.max(1) * 32).next_multiple_of(REGISTER_STEP);
        (REGISTERS / warp / SCHEDULERS * SCHEDULERS).min(WARPS)
    }
}

/// Reads what `ptxas -v` prints.
#[must_use]
pub fn kernels(ptxas: &str) -> Vec<Kernel> {
    let mut found: Vec<Kernel> = Vec::new();
    let before = |line: &str, what: &str| -> usize {
        let part = line.split(what).next().unwrap_or_default();
        part.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    for line in ptxas.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2);
            let (name, target) = (quoted.next().unwrap_or_default(), quoted.next().unwrap_or_default());
            found.push(Kernel { name: readable(name), target: target.into(), ..Kernel::default() });
        }
        let Some(kernel) = found.last_mut() else { continue };
        // What stands behind the registers is of functions the kernel calls.
        if line.contains("bytes stack frame") && kernel.registers == 0 {
            kernel.stack_bytes = before(line, " bytes stack frame");
            kernel.spill_bytes = before(line, " bytes spill stores");
        }
        if line.contains("Used ") && line.contains(" registers") {
            kernel.registers = before(line, " registers");
            kernel.shared_bytes = if line.contains(" bytes smem") { before(line, " bytes smem") } else { 0 };
        }
    }
    found
}

/// The last part of a mangled name that ends in `_kernel`, with its template arguments as the mangling has them.
fn readable(mangled: &str) -> String {
    let Some(end) = mangled.find("_kernel") else { return mangled.to_owned() };
    let end = end + "_kernel".len();
    // A name is preceded by its length.
    let start = (0..end).rev().find(|&start| {
        let length = (end - start).to_string();
        mangled[..start].ends_with(&length)
    });
    let name = &mangled[start.unwrap_or(0)..end];
    let arguments: Vec<&str> = mangled[end..]
        .strip_prefix('I')
        .map_or(Vec::new(), |rest| rest.split('E').take_while(|part| part.starts_with('L')).collect());
    let values: Vec<String> =
        arguments.iter().map(|a| a.trim_start_matches(|c: char| !c.is_ascii_digit()).to_owned()).collect();
    if values.is_empty() { name.to_owned() } else { format!("{name}<{}>", values.join(", ")) }
}

/// A table of kernels.
#[must_use]
pub fn table(kernels: &[Kernel]) -> String {
    let mut text = format!(
        "{:<34} {:<8} {:>9} {:>10} {:>7} {:>7} {:>16}\n",
        "kernel", "target", "registers", "shared B", "stack", "spills", "warps of 64 by regs"
    );
    for k in kernels {
        let _ = writeln!(
            text,
            "{:<34} {:<8} {:>9} {:>10} {:>7} {:>7} {:>16}",
            k.name,
            k.target,
            k.registers,
            k.shared_bytes,
            k.stack_bytes,
            k.spill_bytes,
            k.warps_by_registers()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN61_GLOBAL__N__0_12_layernorm_cu_x16layernorm_kernelILb1EEEv15LayernormParams' for 'sm_90a'
ptxas info    : Function properties for _ZN61_x
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 74 registers, used 1 barriers, 128 bytes smem
ptxas info    : Function properties for _ZN45_called
    0 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads
ptxas info    : Compiling entry function '_Z5plain1P' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 400 bytes cmem[0]
";

    #[test]
    fn ptxas_is_understood() {
        let found = kernels(SAID);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].name.as_str(), found[0].target.as_str()), ("layernorm_kernel<1>", "sm_90a"));
        let k = &found[0];
        assert_eq!((k.registers, k.shared_bytes, k.stack_bytes, k.spill_bytes), (74, 128, 16, 8));
        assert_eq!(k.warps_by_registers(), 24);
        assert_eq!((found[1].registers, found[1].shared_bytes, found[1].warps_by_registers()), (40, 0, 48));
        assert_eq!(table(&found).lines().count(), 3);
    }
}
