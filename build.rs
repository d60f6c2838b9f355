//! Compiles `cuda/*.cu` and binds `cuda/kernels.h`.
fn main() {}
