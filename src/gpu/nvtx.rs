//! NVTX ranges, for Nsight Systems and `ncu --nvtx`: a name around each launch and each test of `peregrine bench`.
//!
//! A profiler asks for them by `NVTX_INJECTION64_PATH`, the library it wants to be told through; without that variable nothing is loaded
//! and a range is one look at a flag. NVTX is headers only; what they do is done here: the library's `InitializeInjectionNvtx2` is
//! handed a way to find our table of function pointers, and fills in its own functions.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::{Library, Symbol};

/// Functions of NVTX's core module, counted from 1; the last entry is none.
const CORE_FUNCTIONS: usize = 16;
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;
/// Numbers in NVTX's headers.
const MODULE_CORE: c_uint = 1;
const TABLE_OF_CALLBACKS: u32 = 1;

/// Where the profiler's library puts its functions.
static SLOTS: [AtomicPtr<c_void>; CORE_FUNCTIONS] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; CORE_FUNCTIONS];
/// Addresses of the slots, as the library wants them.
static ADDRESSES: OnceLock<[usize; CORE_FUNCTIONS + 1]> = OnceLock::new();

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    module: unsafe extern "C" fn(c_uint, *mut *const usize, *mut c_uint) -> c_int,
}

static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), module: module_table };

/// `NvtxGetExportTableFunc_t`.
extern "C" fn export_table(id: u32) -> *const c_void {
    if id == TABLE_OF_CALLBACKS { (&raw const CALLBACKS).cast() } else { std::ptr::null() }
}

/// Gives the table of the core module; there are no others.
#[allow(unsafe_code)]
unsafe extern "C" fn module_table(module: c_uint, table: *mut *const usize, size: *mut c_uint) -> c_int {
    if module != MODULE_CORE {
        return 0;
    }
    let addresses = ADDRESSES.get_or_init(|| {
        std::array::from_fn(|i| SLOTS.get(i).filter(|_| i > 0).map_or(0, |slot| slot.as_ptr() as usize))
    });
    if !table.is_null() {
        // SAFETY: not null, checked above; by NVTX's contract it is room for one pointer.
        unsafe { table.write(addresses.as_ptr()) };
    }
    if !size.is_null() {
        // SAFETY: not null, checked above; by NVTX's contract it is room for one number.
        unsafe { size.write(CORE_FUNCTIONS as c_uint) };
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
        let (push, pop) =
            (SLOTS[RANGE_PUSH].load(Ordering::Acquire), SLOTS[RANGE_POP].load(Ordering::Acquire));
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
