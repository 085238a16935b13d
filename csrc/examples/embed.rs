// embed.c once more, in Rust, through the C ABI: what autoclip.h declares is declared again here.
//
//     rustc -L native="$(pkg-config --variable=libdir autoclip)" embed.rs

use std::ffi::CStr;
use std::os::raw::{c_char, c_int, c_void};

#[repr(C)]
struct History {
    _opaque: [u8; 0],
}

#[link(name = "autoclip")]
extern "C" {
    fn autoclip_history_create(window: u64, allocator: *const c_void, history: *mut *mut History) -> c_int;
    fn autoclip_history_observe(history: *mut History, norm: f64, percentile: f64, threshold: *mut f64) -> c_int;
    fn autoclip_history_destroy(history: *mut History);
    fn autoclip_status_message(status: c_int) -> *const c_char;
}

fn must(status: c_int) {
    if status != 0 {
        panic!("{}", unsafe { CStr::from_ptr(autoclip_status_message(status)) }.to_string_lossy());
    }
}

fn main() {
    let mut history = std::ptr::null_mut();
    must(unsafe { autoclip_history_create(0, std::ptr::null(), &mut history) });
    for norm in [4.0, 1.0, 3.0, 2.0] {
        let mut threshold = 0.0;
        must(unsafe { autoclip_history_observe(history, norm, 10.0, &mut threshold) });
        println!("norm {} threshold {}", norm, threshold);
    }
    unsafe { autoclip_history_destroy(history) };
}
