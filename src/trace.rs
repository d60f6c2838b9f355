//! The debugging switches, read once from the environment. None changes a result, but for the last bits of logits where said.
//!
//! | variable | effect |
//! | --- | --- |
//! | `PEREGRINE_SYNC=1` | wait after every launch: a fault names its op |
//! | `PEREGRINE_NO_GRAPH=1` | launch the kernels of a decode step one by one instead of as a CUDA graph |
//! | `PEREGRINE_NO_PERSISTENT=1` | one kernel an op in decode steps, not one for all: other roundings, so the last bits of logits differ |
//! | `PEREGRINE_NO_SIDES=1` | do not ask which half of L2 memory is on: weights lie anywhere, as on GPUs whose halves are not known |
//! | `PEREGRINE_REQUIRE_GPU=1` | tests that need a GPU fail where there is none, instead of skipping |

use std::sync::OnceLock;

/// The switches' states.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Switches {
    /// `PEREGRINE_SYNC`
    pub(crate) sync: bool,
    /// `PEREGRINE_NO_GRAPH`
    pub(crate) no_graph: bool,
    /// `PEREGRINE_NO_PERSISTENT`
    pub(crate) no_persistent: bool,
    /// `PEREGRINE_NO_SIDES`
    pub(crate) no_sides: bool,
}

/// The switches of this process.
pub(crate) fn switches() -> Switches {
    static SWITCHES: OnceLock<Switches> = OnceLock::new();
    let on = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty() && v != "0");
    *SWITCHES.get_or_init(|| Switches {
        sync: on("PEREGRINE_SYNC"),
        no_graph: on("PEREGRINE_NO_GRAPH"),
        no_persistent: on("PEREGRINE_NO_PERSISTENT"),
        no_sides: on("PEREGRINE_NO_SIDES"),
    })
}
