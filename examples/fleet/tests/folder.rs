//! The whole example over a folder.
//!
//! Excluded: a run that ends well although no reader has seen a new version. What readers see is
//! checked by the program itself.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

use std::process::Command;

#[test]
fn readers_see_what_the_writer_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vmem-fleet"))
        .args(["--seconds", "1", "--names", "3", "--bytes", "70000", "--follow-ms", "20"])
        .arg("--directory")
        .arg(folder.path())
        .env_remove("VMEM_S3_ENDPOINT")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let news: Vec<u64> = said
        .lines()
        .filter_map(|line| line.strip_prefix("reader: ")?.split("all whole; ").nth(1))
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect();
    // Of each of the three names at least the first and the last, unless that was all.
    assert!(news.len() == 2 && news.iter().all(|&news| news >= 3), "{said}");
    let left = std::fs::read_dir(folder.path()).unwrap().flatten();
    let left: Vec<_> = left.filter(|entry| entry.path().is_file()).collect();
    assert!(left.is_empty(), "{left:?}");
}
