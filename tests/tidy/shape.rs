//! The shape of a file: how wide, how long, and that it opens with its page.

use crate::files::{File, Kind, sample};
use crate::{Finding, everywhere, expect_none};

/// Columns of a line of Rust, comments and strings included.
const RUST_COLUMNS: usize = 100;
/// Columns of a line of anything else, tables of Markdown excepted.
const OTHER_COLUMNS: usize = 140;
/// Lines of a file of Rust.
const LINES: usize = 400;

fn wide_lines(file: &File) -> Vec<Finding> {
    let limit = if file.kind == Kind::Rust { RUST_COLUMNS } else { OTHER_COLUMNS };
    let is_table = |line: &str| file.kind == Kind::Markdown && line.starts_with('|');
    file.lines()
        .filter(|(_, line)| line.chars().count() > limit && !is_table(line))
        .map(|(at, line)| {
            Finding::new(file, at, format!("{} columns of {limit}", line.chars().count()))
        })
        .collect()
}

fn long_files(file: &File) -> Vec<Finding> {
    let lines = file.text.lines().count();
    if file.kind != Kind::Rust || lines <= LINES {
        return Vec::new();
    }
    vec![Finding::new(file, lines, format!("{lines} lines of {LINES}"))]
}

fn without_page(file: &File) -> Vec<Finding> {
    let page = file.text.lines().next().and_then(|line| line.strip_prefix("//!"));
    let has_words = page.is_some_and(|page| !page.trim().is_empty());
    if file.kind != Kind::Rust || has_words {
        return Vec::new();
    }
    vec![Finding::new(file, 1, "no page")]
}

#[test]
fn lines_keep_to_their_columns() {
    expect_none(&everywhere(wide_lines), "wrap the line; `cargo fmt` leaves comments and strings");
}

#[test]
fn files_keep_to_their_lines() {
    expect_none(&everywhere(long_files), "split the file where its subject changes");
}

#[test]
fn each_file_opens_with_its_page() {
    let remedy = "open with `//!`: what it is, its invariant, its callers";
    expect_none(&everywhere(without_page), remedy);
}

#[test]
fn wide_line_is_found_by_its_number() {
    let wide = format!("//! A page.\n// {}\n", "word ".repeat(20));
    let found = wide_lines(&sample("a.rs", &wide));
    assert_eq!(found.iter().map(|found| found.line).collect::<Vec<_>>(), [2]);
    let markdown = format!("{0}\n|{0}|\n", "word ".repeat(30));
    assert_eq!(wide_lines(&sample("a.md", &markdown)).len(), 1, "a table may be wide");
    assert_eq!(wide_lines(&sample("a.sh", &"x".repeat(140))).len(), 0);
}

#[test]
fn long_file_is_found_by_its_length() {
    assert_eq!(long_files(&sample("a.rs", &"\n".repeat(401))).len(), 1);
    assert_eq!(long_files(&sample("a.rs", &"\n".repeat(400))).len(), 0);
}

#[test]
fn missing_page_is_found_behind_a_comment() {
    assert_eq!(without_page(&sample("a.rs", "// What it is.\nmod a;\n")).len(), 1);
    assert_eq!(without_page(&sample("a.rs", "//!\nmod a;\n")).len(), 1);
    assert_eq!(without_page(&sample("a.rs", "//! What it is.\nmod a;\n")).len(), 0);
}
