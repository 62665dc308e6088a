//! The bugs that can be planted: the sources, the list and the tests that it names agree.
//!
//! Invariant: a name stands in a `planted!` of the sources if and only if the list has it, and each
//! test of the list is one that `cargo test` would find, as far as a scanner of text can say: names
//! that a macro makes are looked for as words. `scripts/planted.sh` refuses a filter that runs
//! nothing.

use std::collections::BTreeSet;

use crate::files::{File, Kind, all, sample};
use crate::rust::code_of;
use crate::{Finding, expect_none};

/// Where the bugs are listed.
const LIST: &str = "tests/planted.toml";

/// The tests of an entry, as arguments of `cargo test`. None if it is not a sentence with tests.
fn tests_of(entry: &toml::Value) -> Option<Vec<&str>> {
    let is_sentence = entry.get("bug")?.as_str()?.ends_with('.');
    let tests: Option<Vec<_>> =
        entry.get("tests")?.as_array()?.iter().map(|t| t.as_str()).collect();
    tests.filter(|tests| is_sentence && !tests.is_empty())
}

/// The names that a file plants, with their lines.
fn planted(file: &File) -> Vec<(usize, &str)> {
    let is_source = file.path.starts_with("crates/") && file.path.contains("/src/");
    if file.kind != Kind::Rust || !is_source {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (at, line) in file.lines() {
        let rests = line.split("planted!(\"").skip(1);
        found.extend(rests.filter_map(|rest| rest.split('"').next()).map(|name| (at, name)));
    }
    found
}

/// Whether the test binary that these arguments choose has a test that the filters match.
fn matches(files: &[File], arguments: &str) -> bool {
    let mut words = arguments.split_whitespace();
    let (Some("-p"), Some(package), Some(kind)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    let root = if package == "vmem" { String::new() } else { format!("crates/{package}/") };
    let below = match kind {
        "--lib" => format!("{root}src/"),
        "--test" => format!("{root}tests/{}", words.next().unwrap_or_default()),
        _ => return false,
    };
    let is_of = |file: &&File| {
        let rest = file.path.strip_prefix(&below);
        rest.is_some_and(|rest| below.ends_with('/') || rest.starts_with('/') || rest == ".rs")
    };
    let files: Vec<_> = files.iter().filter(|file| file.kind == Kind::Rust).filter(is_of).collect();
    let mut filters = words.filter(|word| *word != "--").peekable();
    let has_filter = filters.peek().is_some();
    !files.is_empty()
        && (!has_filter || filters.all(|filter| files.iter().any(|file| has(file, filter))))
}

/// Whether a file may have a test whose path contains this.
fn has(file: &File, filter: &str) -> bool {
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let code = code_of(&file.pieces);
    if !code.contains("#[test]") && !code.contains("::test") {
        return false;
    }
    let modules: Vec<_> = file.path.trim_end_matches(".rs").split('/').collect();
    let (above, name) = filter.rsplit_once("::").unwrap_or(("", filter));
    let is_module =
        |name: &str| modules.contains(&name) || code.contains(&format!("mod {name} {{"));
    let mut words = code.split(|letter| !is_word(letter)).chain(modules.iter().copied());
    above.split("::").filter(|name| !name.is_empty()).all(is_module)
        && words.any(|word| word.contains(name))
}

/// What is wrong with the list, or with the names in the sources.
fn faults(files: &[File]) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(list) = files.iter().find(|file| file.path == LIST) else { return found };
    let entries: toml::Table = match list.text.parse() {
        Ok(entries) => entries,
        Err(error) => return vec![Finding::new(list, 1, error.to_string())],
    };
    let mut names = BTreeSet::new();
    for file in files {
        for (at, name) in planted(file) {
            names.insert(name);
            if !entries.contains_key(name) {
                found.push(Finding::new(file, at, format!("{LIST} has no bug {name}")));
            }
        }
    }
    for (name, entry) in &entries {
        let header = format!("[{name}]");
        let at = list.lines().find(|(_, line)| *line == header).map_or(1, |(at, _)| at);
        let mut report = |what: String| found.push(Finding::new(list, at, what));
        if !names.contains(name.as_str()) {
            report(format!("no source plants {name}"));
        }
        match tests_of(entry) {
            None => report(format!("{name} has no sentence, or no tests")),
            Some(tests) => tests
                .iter()
                .filter(|tests| !matches(files, tests))
                .for_each(|tests| report(format!("{name}: no test is {tests}"))),
        }
    }
    found
}

#[test]
fn planted_bugs_and_their_tests_are_listed() {
    assert!(all().iter().any(|file| file.path == LIST), "no {LIST}");
    let remedy = "name each bug in tests/planted.toml and in a source, with tests that exist";
    expect_none(&faults(all()), remedy);
}

/// A repository of one bug, with the list `list`.
fn small(list: &str) -> [File; 4] {
    let test = "#[test]\nfn reads_share_fetch() {}\n";
    [
        sample(LIST, list),
        sample("crates/vmem-core/src/a.rs", "if crate::planted!(\"late\") {}"),
        sample("crates/vmem-core/src/a/tests.rs", test),
        sample("tests/it/vram/b.rs", test),
    ]
}

#[test]
fn bug_without_an_entry_and_entry_without_a_bug_are_found() {
    let list = "[gone]\nbug = \"It is late.\"\ntests = [\"-p vmem-core --lib a\"]\n";
    let found: Vec<_> =
        faults(&small(list)).into_iter().map(|found| (found.path, found.line)).collect();
    let source = "crates/vmem-core/src/a.rs".to_owned();
    assert_eq!(found, [(source, 1), (LIST.to_owned(), 1)]);
}

#[test]
fn filter_without_a_test_is_found() {
    for tests in [
        "--test it vram::b",
        "-p vmem --test gone",
        "-p vmem --test it vram::c::",
        "-p vmem --test it vram::b::reads_share_nothing",
        "-p vmem --test it -- vram::b:: gone::",
        "-p vmem-core --lib b",
    ] {
        let list = format!("[late]\nbug = \"It is late.\"\ntests = [\"{tests}\"]\n");
        assert_eq!(faults(&small(&list)).len(), 1, "{tests}");
    }
}

#[test]
fn filter_with_a_test_is_kept() {
    for tests in [
        "-p vmem --test it vram::b::reads_share",
        "-p vmem --test it -- vram:: reads_share_fetch",
        "-p vmem-core --lib a::tests",
    ] {
        let list = format!("[late]\nbug = \"It is late.\"\ntests = [\"{tests}\"]\n");
        let found = faults(&small(&list));
        assert!(found.is_empty(), "{found:?}");
    }
}
