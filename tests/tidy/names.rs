//! The names of tests: subject, behaviour, condition.

use crate::files::{File, Kind, sample};
use crate::{Finding, everywhere, expect_none};

/// Words that begin a clause, not a subject.
const CLAUSES: &[&str] = &["who", "what", "where", "whoever", "whatever", "whose"];

/// Each test of a file, with its line.
pub(crate) fn tests(file: &File) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut is_test = false;
    for (at, line) in file.lines() {
        let line = line.trim_start();
        is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        if let Some(name) = declared(line).filter(|_| is_test) {
            found.push((at, name));
            is_test = false;
        }
    }
    found
}

/// The function that a line declares.
fn declared(line: &str) -> Option<&str> {
    let line = line.strip_prefix("async ").unwrap_or(line);
    let name = line.strip_prefix("fn ")?;
    name.split(['(', '<']).next()
}

/// What is wrong with the name of a test.
fn fault(name: &str) -> Option<&'static str> {
    let mut words = name.split('_');
    if words.clone().filter(|word| !word.is_empty()).count() < 3 {
        return Some("fewer than three words");
    }
    let first = words.next()?;
    if first == "test" {
        return Some("a test is a test: no `test_`");
    }
    CLAUSES.contains(&first).then_some("a clause, not a subject")
}

fn bad_names(file: &File) -> Vec<Finding> {
    if file.kind != Kind::Rust {
        return Vec::new();
    }
    let faults = tests(file).into_iter().filter_map(|(at, name)| Some((at, name, fault(name)?)));
    faults.map(|(at, name, fault)| Finding::new(file, at, format!("{name}: {fault}"))).collect()
}

#[test]
fn tests_are_named_by_subject_and_behaviour() {
    let remedy = "name the subject, its behaviour, and the condition if there is one";
    expect_none(&everywhere(bad_names), remedy);
}

#[test]
fn short_and_clausal_names_are_found() {
    let bad = "#[test]\nfn it_works() {}\n\
               #[tokio::test(start_paused = true)]\nasync fn test_a_b_c() {}\n\
               #[test]\n#[should_panic]\nfn who_waits_is_woken() {}\nfn helper() {}\n";
    let found = bad_names(&sample("a.rs", bad));
    assert_eq!(found.iter().map(|found| found.line).collect::<Vec<_>>(), [2, 4, 7]);
}

#[test]
fn plain_name_of_three_words_is_kept() {
    assert!(bad_names(&sample("a.rs", "#[test]\nfn reads_share_fetch() {}\n")).is_empty());
}
