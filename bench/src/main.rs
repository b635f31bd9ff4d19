//! The `sluice-bench` command.
fn main() {}
