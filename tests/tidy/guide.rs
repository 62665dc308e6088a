//! The user's guide is whole: its summary, its pages, its programs, and its table of errors.
//!
//! Invariant: the summary lists each page once and no other; each page with a program is in the
//! sources, where doctests compile it; the table of errors has each variant of the error type and
//! no other.

use std::collections::BTreeMap;

use crate::files::{File, Kind, files, sample};
use crate::{Finding, expect_none};

/// Where the pages are.
const PAGES: &str = "docs/guide/src/";
/// The page of contents.
const SUMMARY: &str = "docs/guide/src/SUMMARY.md";
/// The page with the table of errors, which stands behind this heading.
const ERRORS: &str = "docs/guide/src/operating.md";
const ERRORS_HEADING: &str = "## Every error";
/// The source of the error type, whose variants stand behind this line.
const ERROR_TYPE: &str = "crates/vmem-core/src/error.rs";
const ERROR_TYPE_OPENS: &str = "pub enum VirtualMemoryError {";

/// The file of this path.
fn of<'a>(all: &[&'a File], path: &str) -> Option<&'a File> {
    all.iter().copied().find(|file| file.path == path)
}

/// The targets of the links of a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// What is wrong between the summary and the pages.
fn summary_faults(all: &[&File]) -> Vec<Finding> {
    let Some(summary) = of(all, SUMMARY) else { return Vec::new() };
    let mut listed = BTreeMap::new();
    let mut found = Vec::new();
    for (at, line) in summary.lines() {
        for link in links(line) {
            if of(all, &format!("{PAGES}{link}")).is_none() {
                found.push(Finding::new(summary, at, format!("there is no page {link}")));
            }
            if let Some(first) = listed.insert(link, at) {
                found.push(Finding::new(summary, at, format!("{link} is in line {first} too")));
            }
        }
    }
    let is_page = |file: &&&File| file.kind == Kind::Markdown && file.path != SUMMARY;
    for page in all.iter().filter(is_page) {
        let Some(name) = page.path.strip_prefix(PAGES) else { continue };
        if !listed.contains_key(name) {
            found.push(Finding::new(page, 1, format!("{SUMMARY} does not list it")));
        }
    }
    found
}

/// Pages with programs that no source includes.
fn uncompiled(all: &[&File]) -> Vec<Finding> {
    let opens = |(_, line): &(usize, &str)| line.starts_with("```rust");
    let program = |page: &File| page.lines().find(opens).map(|(at, _)| at);
    let is_included = |page: &File| {
        let included = format!("{}\")]", page.path);
        all.iter().any(|file| file.kind == Kind::Rust && file.text.contains(&included))
    };
    let pages = all.iter().filter(|file| file.path.starts_with(PAGES) && !is_included(file));
    let what = "a program that no doctest compiles";
    pages.filter_map(|page| Some(Finding::new(page, program(page)?, what))).collect()
}

/// Programs that no compiler sees, on any page.
fn ignored(all: &[&File]) -> Vec<Finding> {
    let pages = all.iter().filter(|file| file.path.starts_with(PAGES));
    let is_ignored = |line: &str| line.starts_with("```rust") && line.contains("ignore");
    pages
        .flat_map(|page| {
            let lines = page.lines().filter(|&(_, line)| is_ignored(line));
            lines.map(|(at, _)| Finding::new(page, at, "a program that is ignored"))
        })
        .collect()
}

/// The variants of the error type, with their lines.
fn variants(source: &File) -> BTreeMap<&str, usize> {
    let body = source.lines().skip_while(|(_, line)| *line != ERROR_TYPE_OPENS).skip(1);
    let lines = body.take_while(|(_, line)| *line != "}");
    let named = lines.filter_map(|(at, line)| {
        let name = line.strip_prefix("    ")?;
        let ends = name.find(|letter: char| !letter.is_alphanumeric()).unwrap_or(name.len());
        name.starts_with(char::is_uppercase).then(|| (&name[..ends], at))
    });
    named.collect()
}

/// The first cells of the table of errors, with their lines.
fn rows(page: &File) -> BTreeMap<&str, usize> {
    let table = page.lines().skip_while(|(_, line)| *line != ERRORS_HEADING).skip(1);
    let lines = table.take_while(|(_, line)| !line.starts_with('#'));
    let named = lines.filter_map(|(at, line)| {
        let cell = line.strip_prefix("| `")?;
        Some((cell.split('`').next().unwrap_or_default(), at))
    });
    named.collect()
}

/// Variants without a row, and rows without a variant.
fn error_faults(source: &File, page: &File) -> Vec<Finding> {
    let variants = variants(source);
    let rows = rows(page);
    let without = variants.iter().filter(|(name, _)| !rows.contains_key(*name));
    let unknown = rows.iter().filter(|(name, _)| !variants.contains_key(*name));
    let missing = without
        .map(|(name, &at)| Finding::new(source, at, format!("the table in {ERRORS} lacks {name}")));
    missing
        .chain(unknown.map(|(name, &at)| Finding::new(page, at, format!("no error is {name}"))))
        .collect()
}

#[test]
fn summary_lists_each_page_of_the_guide() {
    let all: Vec<_> = files().collect();
    assert!(of(&all, SUMMARY).is_some(), "there is no {SUMMARY}");
    expect_none(&summary_faults(&all), "list each page once, and no page that does not exist");
}

#[test]
fn programs_of_the_guide_are_compiled() {
    let all: Vec<_> = files().collect();
    let mut found = uncompiled(&all);
    found.extend(ignored(&all));
    expect_none(&found, "include the page in the `guide` of src/lib.rs, and ignore no program");
}

#[test]
fn table_of_errors_has_each_variant() {
    let all: Vec<_> = files().collect();
    let source = of(&all, ERROR_TYPE).expect("the source of the error type");
    let page = of(&all, ERRORS).expect("the page with the table of errors");
    assert!(variants(source).contains_key("Closed"), "{ERROR_TYPE} is not read as it should be");
    expect_none(&error_faults(source, page), "say in the table what it means and what to do");
}

/// The lines at which something is found.
fn lines(found: &[Finding]) -> Vec<(&str, usize)> {
    found.iter().map(|finding| (finding.path.as_str(), finding.line)).collect()
}

#[test]
fn page_that_is_not_listed_is_found() {
    let summary = sample(SUMMARY, "# Summary\n\n- [A](a.md)\n- [Gone](gone.md)\n- [A](a.md)\n");
    let listed = sample("docs/guide/src/a.md", "# A\n");
    let forgotten = sample("docs/guide/src/b.md", "# B\n");
    let elsewhere = sample("docs/c.md", "# C\n");
    let found = summary_faults(&[&summary, &listed, &forgotten, &elsewhere]);
    assert_eq!(lines(&found), [(SUMMARY, 4), (SUMMARY, 5), ("docs/guide/src/b.md", 1)]);
}

#[test]
fn program_that_is_not_compiled_is_found() {
    let program = "# A\n\n```rust\nlet a = 1;\n```\n";
    let included = sample("docs/guide/src/a.md", program);
    let forgotten = sample("docs/guide/src/b.md", program);
    let plain = sample("docs/guide/src/c.md", "# C\n\n```sh\nls\n```\n");
    let text = "//! A page.\n#[doc = include_str!(\"../docs/guide/src/a.md\")]\nmod a {}\n";
    let source = sample("src/lib.rs", text);
    let found = uncompiled(&[&included, &forgotten, &plain, &source]);
    assert_eq!(lines(&found), [("docs/guide/src/b.md", 3)]);
    let skipped = sample("docs/guide/src/d.md", "```rust\n```\n```rust,ignore\n```\n");
    assert_eq!(lines(&ignored(&[&included, &skipped])), [("docs/guide/src/d.md", 3)]);
}

#[test]
fn error_without_a_row_is_found_and_so_is_a_row_without_an_error() {
    let text = "//! A page.\npub enum VirtualMemoryError {\n    /// Full.\n    Full {\n        \
                /// Of what.\n        of: u8,\n    },\n    Closed,\n}\n\nfn f() {\n    Other\n}\n";
    let source = sample(ERROR_TYPE, text);
    let page =
        "| `Before` |\n## Every error\n\n| variant |\n|---|\n| `Full` | a |\n| `Lost` | b |\n";
    let found = error_faults(&source, &sample(ERRORS, page));
    assert_eq!(lines(&found), [(ERROR_TYPE, 8), (ERRORS, 7)]);
}
