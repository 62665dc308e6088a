//! Gives the shared library the name by which the dynamic linker knows the CUDA driver: once it is
//! loaded by its path, code that asks for `libcuda.so` gets it, with no environment variable.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    }
}
