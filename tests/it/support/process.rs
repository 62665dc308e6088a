//! Tests in a process of their own: this test binary again, with one test.
//!
//! Invariant: a child runs the test that it was started for and no other, under the name that the
//! test has in this binary, wherever its module is. Called by tests that are killed, that deny
//! themselves something, or that look at what belongs to a whole process.

use std::env;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The variable that tells a child which directory it is to use.
pub(crate) const CHILD_DIR: &str = "VMEM_TEST_CHILD_DIR";
/// Set where the test of [`alone`] is the only one of its process.
const ALONE: &str = "VMEM_TEST_ALONE";

/// This test binary, to run the test of this name in `module`, which is `module_path!()`.
pub(crate) fn again(module: &str, test: &str) -> Command {
    let (_, module) = module.split_once("::").expect("a module of this crate");
    let mut command = Command::new(env::current_exe().expect("the test binary has a path"));
    command.args(["--exact", &format!("{module}::{test}"), "--nocapture", "--include-ignored"]);
    command
}

/// As [`again`], in the role of the child in `dir`, with pipes to and from it.
pub(crate) fn child(module: &str, test: &str, dir: &Path) -> Child {
    again(module, test)
        .env(CHILD_DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the child starts")
}

/// Runs `work`, which is this test, where nothing else runs: in a child, if this is not it.
pub(crate) fn alone(module: &str, test: &str, work: impl FnOnce()) {
    if env::var_os(ALONE).is_some() {
        return work();
    }
    let output = again(module, test).env(ALONE, "1").output().expect("the child starts");
    print!("{}", String::from_utf8_lossy(&output.stdout));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    let ran = String::from_utf8_lossy(&output.stdout).contains("test result: ok. 1 passed");
    assert!(output.status.success() && ran, "{test}, alone: {}", output.status);
}
