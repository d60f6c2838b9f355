//! How the GPU is while something is measured: clocks, temperature, power. NVML comes with the driver and is loaded at run time;
//! where it is missing nothing is known, and nothing fails.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use libloading::{Library, Symbol};

use super::Gpu;

/// What NVML calls success.
const SUCCESS: c_int = 0;
const CLOCK_SM: c_uint = 1;
const CLOCK_MEMORY: c_uint = 2;

/// One look at the GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Look {
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: u32,
    /// Clock of the memory, MHz.
    pub memory_mhz: u32,
    /// Degrees Celsius.
    pub celsius: u32,
    /// Watts.
    pub watts: f64,
}

/// NVML, and one GPU in it.
pub struct Nvml {
    library: Library,
    device: *mut c_void,
    driver: String,
    most_sm_mhz: u32,
}

// SAFETY: NVML may be called from any thread, and a device handle is valid in all of them.
#[allow(unsafe_code)]
unsafe impl Send for Nvml {}

impl Nvml {
    /// NVML's view of `gpu`; `None` where there is no NVML or it does not know the GPU.
    #[must_use]
    #[allow(unsafe_code)]
    pub fn open(gpu: &Gpu) -> Option<Nvml> {
        // SAFETY: loads a library of the NVIDIA driver, which is made to be loaded by any program.
        let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
        let mut nvml = Nvml { library, device: std::ptr::null_mut(), driver: String::new(), most_sm_mhz: 0 };
        let init: Symbol<'_, unsafe extern "C" fn() -> c_int> = nvml.symbol("nvmlInit_v2")?;
        // SAFETY: takes nothing; the name's type is NVML's.
        if unsafe { init() } != SUCCESS {
            return None;
        }
        let id = CString::new(gpu.pci_id()?).ok()?;
        let by_pci: Symbol<'_, unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int> =
            nvml.symbol("nvmlDeviceGetHandleByPciBusId_v2")?;
        let mut device = std::ptr::null_mut();
        // SAFETY: a nul-terminated string, and one pointer that the call writes.
        if unsafe { by_pci(id.as_ptr(), &raw mut device) } != SUCCESS {
            return None;
        }
        nvml.device = device;
        nvml.driver = nvml.driver_version().unwrap_or_default();
        nvml.most_sm_mhz = nvml.number("nvmlDeviceGetMaxClockInfo", CLOCK_SM).unwrap_or(0);
        Some(nvml)
    }

    #[allow(unsafe_code)]
    fn symbol<T>(&self, name: &str) -> Option<Symbol<'_, T>> {
        // SAFETY: each caller gives the type that nvml.h declares for the name.
        unsafe { self.library.get(name.as_bytes()) }.ok()
    }

    #[allow(unsafe_code)]
    fn driver_version(&self) -> Option<String> {
        let version: Symbol<'_, unsafe extern "C" fn(*mut c_char, c_uint) -> c_int> =
            self.symbol("nvmlSystemGetDriverVersion")?;
        let mut text = [0u8; 80];
        // SAFETY: writes at most as many bytes as the array has, a nul among them.
        let code = unsafe { version(text.as_mut_ptr().cast(), text.len() as c_uint) };
        let end = text.iter().position(|&b| b == 0)?;
        (code == SUCCESS).then(|| String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// A call that takes the device and a kind, and gives one number.
    #[allow(unsafe_code)]
    fn number(&self, name: &str, kind: c_uint) -> Option<u32> {
        let call: Symbol<'_, unsafe extern "C" fn(*mut c_void, c_uint, *mut c_uint) -> c_int> =
            self.symbol(name)?;
        let mut value = 0;
        // SAFETY: a device of this NVML, and one number that the call writes.
        (unsafe { call(self.device, kind, &raw mut value) } == SUCCESS).then_some(value)
    }

    /// The driver's version.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The highest clock of the multiprocessors, MHz; 0: unknown.
    #[must_use]
    pub fn most_sm_mhz(&self) -> u32 {
        self.most_sm_mhz
    }

    /// How the GPU is now; what NVML does not say is 0.
    #[must_use]
    #[allow(unsafe_code)]
    pub fn look(&self) -> Look {
        let power: Option<Symbol<'_, unsafe extern "C" fn(*mut c_void, *mut c_uint) -> c_int>> =
            self.symbol("nvmlDeviceGetPowerUsage");
        let mut milliwatts = 0;
        let known = power.is_some_and(|power| {
            // SAFETY: a device of this NVML, and one number that the call writes.
            unsafe { power(self.device, &raw mut milliwatts) == SUCCESS }
        });
        Look {
            sm_mhz: self.number("nvmlDeviceGetClockInfo", CLOCK_SM).unwrap_or(0),
            memory_mhz: self.number("nvmlDeviceGetClockInfo", CLOCK_MEMORY).unwrap_or(0),
            celsius: self.number("nvmlDeviceGetTemperature", 0).unwrap_or(0),
            watts: if known { f64::from(milliwatts) / 1e3 } else { 0.0 },
        }
    }
}
