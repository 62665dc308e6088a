//! The program in the README is the one in `examples/hello.rs`, which is compiled and run.
//!
//! Invariant: the first block of Rust in the README equals that file, byte for byte.

#[test]
fn the_program_in_the_readme_is_the_example() {
    let (_, after) = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"))
        .split_once("```rust\n")
        .unwrap();
    let (program, _) = after.split_once("```\n").unwrap();
    assert_eq!(program, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/hello.rs")));
}
