//! The `sluice` command.

fn main() -> std::process::ExitCode {
    sluice_control::cli::main()
}
