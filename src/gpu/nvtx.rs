//! NVTX ranges, for Nsight Systems and `ncu --nvtx`: a name around each launch and each test of `peregrine bench`.
//!
//! A profiler asks for them by `NVTX_INJECTION64_PATH`, the library it wants to be told through; without that variable nothing is loaded
//! and a range is one look at a flag. NVTX is headers only; what they do is done here: the library's `InitializeInjectionNvtx2` is
//! handed a way to find our table of function pointers, and fills in its own functions.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::{Library, Symbol};

/// Functions of each of NVTX's modules, whose numbers begin at 1: core, CUDA, OpenCL, CUDA runtime, core 2, synchronisation. A profiler wants
/// to see all of them, and fills in what it has.
const FUNCTIONS: [usize; 7] = [0, 15, 8, 14, 6, 15, 6];
const MOST_FUNCTIONS: usize = 15;
/// Numbers in NVTX's headers.
const MODULE_CORE: usize = 1;
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;
const TABLE_OF_CALLBACKS: u32 = 1;
const TABLE_OF_VERSIONS: u32 = 3;

/// Where the profiler's library puts its functions: by module and number, both from 1 on.
static SLOTS: [[AtomicPtr<c_void>; MOST_FUNCTIONS + 1]; FUNCTIONS.len()] =
    [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; MOST_FUNCTIONS + 1] }; FUNCTIONS.len()];
/// Addresses of the slots, as the library wants them; behind a module's last there is none.
static ADDRESSES: OnceLock<[[usize; MOST_FUNCTIONS + 2]; FUNCTIONS.len()]> = OnceLock::new();

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    module: unsafe extern "C" fn(c_uint, *mut *const usize, *mut c_uint) -> c_int,
}

static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), module: module_table };

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct Versions {
    bytes: usize,
    version: u32,
    reserved: u32,
    set_version: extern "C" fn(u32),
}

static VERSIONS: Versions =
    Versions { bytes: size_of::<Versions>(), version: 3, reserved: 0, set_version: ignore_version };

/// The library says which version it is of.
extern "C" fn ignore_version(_: u32) {}

/// `NvtxGetExportTableFunc_t`.
extern "C" fn export_table(id: u32) -> *const c_void {
    match id {
        TABLE_OF_CALLBACKS => (&raw const CALLBACKS).cast(),
        TABLE_OF_VERSIONS => (&raw const VERSIONS).cast(),
        _ => std::ptr::null(),
    }
}

/// Gives the table of a module.
#[allow(unsafe_code)]
unsafe extern "C" fn module_table(module: c_uint, table: *mut *const usize, size: *mut c_uint) -> c_int {
    let addresses = ADDRESSES.get_or_init(|| {
        let slot = |module: usize, i: usize| SLOTS.get(module).and_then(|slots| slots.get(i));
        std::array::from_fn(|module| {
            std::array::from_fn(|i| match slot(module, i) {
                Some(slot) if (1..=FUNCTIONS[module]).contains(&i) => slot.as_ptr() as usize,
                _ => 0,
            })
        })
    });
    let (Some(addresses), Some(&functions)) =
        (addresses.get(module as usize), FUNCTIONS.get(module as usize))
    else {
        return 0;
    };
    if functions == 0 {
        return 0;
    }
    if !table.is_null() {
        // SAFETY: not null, checked above; by NVTX's contract it is room for one pointer.
        unsafe { table.write(addresses.as_ptr()) };
    }
    if !size.is_null() {
        // SAFETY: not null, checked above; by NVTX's contract it is room for one number.
        unsafe { size.write(functions as c_uint + 1) };
    }
    1
}

/// The profiler's functions, if there is a profiler.
#[allow(unsafe_code)]
fn functions() -> Option<(Push, Pop)> {
    static FUNCTIONS: OnceLock<Option<(Push, Pop)>> = OnceLock::new();
    *FUNCTIONS.get_or_init(|| {
        let path = std::env::var_os("NVTX_INJECTION64_PATH")?;
        // SAFETY: runs the initialisers of a library that whoever started this process named for this purpose.
        let library = unsafe { Library::new(path) }.ok()?;
        type Init = unsafe extern "C" fn(extern "C" fn(u32) -> *const c_void) -> c_int;
        // SAFETY: the type is that of NVTX's headers for this name.
        let init: Symbol<'_, Init> = unsafe { library.get(b"InitializeInjectionNvtx2") }.ok()?;
        // SAFETY: the function it is handed is there for the whole process, as is everything it leads to.
        let accepted = unsafe { init(export_table) };
        // Its functions are called until the process ends.
        std::mem::forget(library);
        let core = &SLOTS[MODULE_CORE];
        let (push, pop) = (core[RANGE_PUSH].load(Ordering::Acquire), core[RANGE_POP].load(Ordering::Acquire));
        if accepted == 0 || push.is_null() || pop.is_null() {
            return None;
        }
        // SAFETY: not null, checked above; the library put nvtxRangePushA's implementation there, which has this type.
        let push = unsafe { std::mem::transmute::<*mut c_void, Push>(push) };
        // SAFETY: not null, checked above; the library put nvtxRangePop's implementation there, which has this type.
        let pop = unsafe { std::mem::transmute::<*mut c_void, Pop>(pop) };
        Some((push, pop))
    })
}

/// A range that ends when it is dropped, on the thread it began on.
pub struct Range(Option<Pop>, std::marker::PhantomData<*const ()>);

/// Begins a range, if a profiler listens.
#[must_use]
#[allow(unsafe_code)]
pub fn range(name: &str) -> Range {
    let pop = functions().and_then(|(push, pop)| {
        let name = CString::new(name).ok()?;
        // SAFETY: a string that ends in nul, which NVTX copies.
        unsafe { push(name.as_ptr()) };
        Some(pop)
    });
    Range(pop, std::marker::PhantomData)
}

impl Drop for Range {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Some(pop) = self.0 {
            // SAFETY: takes nothing; ends the range that this thread began last, which is this one, as guards drop in reverse order.
            unsafe { pop() };
        }
    }
}
