//! Items that a crate shows and that nobody uses.
//!
//! A name counts as used if it stands in the code of another file of this repository, or in a
//! document. The compiler finds what is private and dead; it cannot know of `pub`.

use std::collections::{HashMap, HashSet};

use crate::files::{File, Kind, all, sample};
use crate::rust::code_of;
use crate::{Finding, expect_none};

/// The crates that are looked through.
const CRATES: &[&str] = &[
    "crates/vmem-core/src/",
    "crates/vmem-io/src/",
    "crates/vmem-gpu/src/",
    "crates/vmem-object-store/src/",
    "crates/vmem-remote/src/",
    "crates/vmem-cuda-emulator/src/",
];

/// What is shown for users, and that nothing here calls: the name, and the reason.
const KEPT: &[(&str, &str)] =
    &[("view_mut", "users pass it to kernels that change an object, as `view` to those that read")];

/// The name that a line declares and shows.
fn shown(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let mut rest = line.strip_prefix("pub ").or_else(|| line.strip_prefix("pub(crate) "))?;
    for word in ["async ", "const ", "unsafe "] {
        rest = rest.strip_prefix(word).unwrap_or(rest);
    }
    let words = ["fn ", "struct ", "enum ", "trait ", "type ", "static ", "union "];
    let name = words.iter().find_map(|word| rest.strip_prefix(word)).or_else(|| {
        // `const` was taken off already.
        line.contains("const ").then_some(rest)
    })?;
    name.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next()
}

/// Whether a shown item of this text besides the declaration at `at` names it: a type that a shown
/// function returns cannot be private, and users need not name it.
fn is_part_of_another(code: &str, name: &str, at: usize) -> bool {
    let mut is_shown = false;
    let mut is_enum = false;
    for (_, text) in code.lines().enumerate().filter(|&(line, _)| line != at) {
        let begins = text.trim_start().starts_with("pub");
        is_shown |= begins;
        // The variants of an enum are shown with it.
        is_enum |= begins && text.contains(" enum ");
        let mut words = text.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
        if is_shown && words.any(|word| word == name) {
            return true;
        }
        is_enum &= text != "}";
        is_shown &= is_enum || !text.contains(['{', ';', '}']);
    }
    false
}

/// In which files each word stands, as far as the first two go.
fn uses(files: &[File]) -> HashMap<&str, HashSet<&str>> {
    let mut found: HashMap<&str, HashSet<&str>> = HashMap::new();
    for file in files {
        for word in file.text.split(|letter: char| !letter.is_alphanumeric() && letter != '_') {
            let paths = found.entry(word).or_default();
            if paths.len() < 2 {
                paths.insert(&file.path);
            }
        }
    }
    found
}

fn unused(files: &[File]) -> Vec<Finding> {
    let uses = uses(files);
    let mut found = Vec::new();
    for file in files.iter().filter(|file| CRATES.iter().any(|src| file.path.starts_with(src))) {
        if file.kind != Kind::Rust {
            continue;
        }
        let code = code_of(&file.pieces);
        for (at, line) in code.lines().enumerate() {
            let Some(name) = shown(line) else { continue };
            let is_used = uses.get(name).is_some_and(|paths| paths.len() > 1);
            let is_type = name.chars().next().is_some_and(char::is_uppercase)
                && name.chars().any(char::is_lowercase);
            let is_kept = KEPT.iter().any(|(kept, _)| *kept == name)
                || is_type && is_part_of_another(&code, name, at);
            if !is_used && !is_kept {
                found.push(Finding::new(file, at + 1, format!("{name} is named in no other file")));
            }
        }
    }
    found
}

#[test]
fn shown_items_are_used_by_another_file() {
    let remedy = "make it private, remove it, or enter it in `KEPT` with the reason";
    expect_none(&unused(all()), remedy);
}

#[test]
fn kept_items_have_reasons_and_exist() {
    for (name, reason) in KEPT {
        assert!(reason.len() > 10, "{name} has no reason");
        let is_shown =
            all().iter().any(|file| file.text.lines().any(|line| shown(line) == Some(name)));
        assert!(is_shown, "{name} is no more: take it out of `KEPT`");
    }
}

#[test]
fn item_that_nobody_names_is_found() {
    let own = "pub fn used(\n) -> Answer {}\npub(crate) struct Dead;\npub const fn lost() {}\n\
               pub const GONE: u8 = 0;\nfn hidden(_: Dead) { lost() }\npub struct Answer;\n";
    let files = [sample("crates/vmem-io/src/a.rs", own), sample("tests/b.rs", "used();")];
    let lines: Vec<_> = unused(&files).into_iter().map(|found| found.line).collect();
    assert_eq!(lines, [3, 4, 5]);
}
