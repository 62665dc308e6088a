//! What documents name exists: files, modules, tests, scenarios, bars, invariants.
//!
//! Invariant: a name is what stands in backquotes outside of fenced code, a link's target, a
//! number behind "scenario", or a letter with a number. A name without a path is that of a file if
//! it ends as one, and that of a test or function if it has three words.

use std::collections::HashSet;
use std::path::Path;

use crate::files::{File, Kind, ROOTS, all, root, sample};
use crate::names::tests;
use crate::{Finding, expect_none};

/// Where numbers are explained.
const LEGEND: &str = "docs/legend.md";

/// Names that documents give as examples of what not to write.
const EXAMPLES: &[&str] = &["take_what_is_ready"];

/// Every file, and what is in it.
struct Repository<'a> {
    files: &'a [File],
    /// The words of all files that are no documents.
    words: HashSet<&'a str>,
    /// Numbers of scenarios, `P7`, `I5`, that the legend explains.
    explained: HashSet<&'a str>,
}

impl<'a> Repository<'a> {
    fn new(files: &'a [File]) -> Self {
        let legend = files.iter().filter(|file| file.path == LEGEND);
        let rows = legend.flat_map(File::lines).filter_map(|(_, line)| line.strip_prefix("| "));
        let explained = rows.filter_map(|row| row.split(' ').next()).collect();
        let sources = files.iter().filter(|file| file.kind != Kind::Markdown);
        let words = sources.flat_map(|file| file.text.split(|letter| !is_word(letter))).collect();
        Repository { files, words, explained }
    }

    /// Whether there is a file or folder of this path. What is not text exists on disk alone.
    fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let is_below = |file: &File| {
            file.path
                .strip_prefix(path)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.files.iter().any(is_below) || root().join(path).exists()
    }

    /// Whether there is a file of this name in some folder.
    fn has_named(&self, name: &str) -> bool {
        let is_it = |file: &File| file.path.rsplit('/').next() == Some(name);
        self.files.iter().any(is_it) || root().join(name).exists()
    }

    /// The files in this path, which may be one.
    fn below(&self, path: &str) -> impl Iterator<Item = &File> {
        self.files.iter().filter(move |file| file.path.starts_with(path))
    }

    /// The path of a module that is named as `object/gate` or `vmem-gpu/lease`.
    fn module(&self, name: &str) -> Option<String> {
        let crates = [
            "core",
            "io",
            "gpu",
            "testkit",
            "cuda-emulator",
            "object-store",
            "remote",
            "gpu-check",
        ];
        let (of, inside) = match name.split_once('/') {
            Some((of, inside)) if of.starts_with("vmem-") => (Some(of.to_owned()), inside),
            _ => (None, name),
        };
        let of: Vec<_> = of.map_or_else(
            || crates.iter().map(|name| format!("vmem-{name}")).collect(),
            |of| vec![of],
        );
        let inside = inside.trim_end_matches('/');
        let paths = of.iter().flat_map(|of| {
            let path = format!("crates/{of}/src/{inside}");
            [format!("{path}.rs"), path]
        });
        paths.into_iter().find(|path| self.has(path))
    }
}

/// What is wrong with a name in backquotes, if it names a file, a module or a test.
fn fault(repository: &Repository<'_>, name: &str) -> Option<String> {
    let (path, inside) = match name.split_once("::") {
        Some((path, inside)) => (path, Some(inside)),
        None => (name, None),
    };
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "/_-.".contains(letter);
    if path == name && !path.contains('/') {
        return bare_fault(repository, name);
    }
    if !path.contains('/') || !path.chars().all(is_plain) {
        return None;
    }
    let root = path.split('/').next().unwrap_or_default();
    let at = if ROOTS.contains(&root) {
        path.to_owned()
    } else if let Some(module) = repository.module(path) {
        module
    } else {
        let is_module =
            !root.is_empty() && !path.contains('.') && repository.module(root).is_some();
        return is_module.then(|| format!("no module {path}"));
    };
    if !repository.has(&at) {
        return Some(format!("{at} does not exist"));
    }
    let inside = inside?.split("::").last()?;
    let is_there = repository.below(&at).any(|file| declares(&file.text, inside));
    (!is_there).then(|| format!("no {inside} in {at}"))
}

/// What is wrong with a name that has no path.
fn bare_fault(repository: &Repository<'_>, name: &str) -> Option<String> {
    let is_of_file = |letter: char| is_word(letter) || "-.".contains(letter);
    let is_file = [".rs", ".sh", ".md"].iter().any(|end| {
        name.strip_suffix(end).is_some_and(|stem| !stem.is_empty() && stem.chars().all(is_of_file))
    });
    if is_file {
        return (!repository.has_named(name)).then(|| format!("no file is named {name}"));
    }
    let is_small =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
    let words = name.split('_').filter(|word| !word.is_empty()).count();
    let is_function = words > 2 && name.chars().all(is_small);
    let is_there = repository.words.contains(name) || EXAMPLES.contains(&name);
    (is_function && !is_there).then(|| format!("nothing is named {name}"))
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// Whether a text declares this function or type.
fn declares(text: &str, name: &str) -> bool {
    ["fn ", "struct ", "enum ", "trait ", "const ", "mod "].iter().any(|word| {
        let declaration = format!("{word}{name}");
        let ends = |at: usize| !text[at + declaration.len()..].chars().next().is_some_and(is_word);
        text.match_indices(&declaration).any(|(at, _)| ends(at))
    })
}

fn missing(repository: &Repository<'_>, document: &File) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut is_code = false;
    for (at, line) in document.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let mut report = |what| found.push(Finding::new(document, at, what));
        not_to_run(repository, line).into_iter().for_each(&mut report);
        if is_code {
            continue;
        }
        let quoted = line.split('`').skip(1).step_by(2);
        quoted.filter_map(|name| fault(repository, name)).for_each(&mut report);
        let folder = Path::new(&document.path).parent().unwrap_or(Path::new(""));
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let link = link.split('#').next().unwrap_or_default();
            let is_here = !link.is_empty() && !link.contains("://");
            if is_here && !root().join(folder).join(link).exists() {
                report(format!("the link to {link} leads nowhere"));
            }
        }
        for number in numbers(line).filter(|number| !repository.explained.contains(number.as_str()))
        {
            report(format!("{number} is not in {LEGEND}"));
        }
    }
    found
}

/// Tests and examples that a line runs, as a command does, and that do not exist.
fn not_to_run(repository: &Repository<'_>, line: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (option, folder) in [("--test ", "tests"), ("--example ", "examples")] {
        for target in behind(line, option) {
            let paths = [format!("{folder}/{target}.rs"), format!("{folder}/{target}/main.rs")];
            // Of the facade, or of a crate.
            let is_one = |file: &File, path: &String| {
                file.path.strip_suffix(path).is_some_and(|of| of.is_empty() || of.ends_with('/'))
            };
            let exists = |path| repository.files.iter().any(|file| is_one(file, path));
            if !paths.iter().any(exists) {
                found.push(format!("there is no {} to run", paths[0]));
            }
        }
    }
    found
}

/// The names that stand behind an option. `NAME` is a placeholder.
fn behind<'a>(line: &'a str, option: &str) -> impl Iterator<Item = &'a str> {
    let ends =
        |letter: char| !letter.is_ascii_lowercase() && !letter.is_ascii_digit() && letter != '_';
    let rests: Vec<_> =
        line.match_indices(option).map(|(at, text)| &line[at + text.len()..]).collect();
    rests
        .into_iter()
        .map(move |rest| rest.split(ends).next().unwrap_or_default())
        .filter(|name| !name.is_empty())
}

/// What a line calls by a number: `P7`, `G1`, `I5`, or "scenario 12", which gives `12`.
fn numbers(line: &str) -> impl Iterator<Item = String> {
    let words: Vec<_> =
        line.split(|letter| !is_word(letter)).filter(|word| !word.is_empty()).collect();
    let is_number =
        |word: &str| !word.is_empty() && word.chars().all(|digit| digit.is_ascii_digit());
    let lettered = words
        .iter()
        .copied()
        .filter(move |word| word.strip_prefix(['P', 'G', 'I']).is_some_and(is_number));
    let scenarios = words
        .windows(2)
        .filter(move |pair| matches!(pair[0], "scenario" | "scenarios" | "Scenario" | "Scenarios"))
        .map(|pair| pair[1])
        .filter(move |word| is_number(word));
    let named = words
        .iter()
        .filter_map(|word| word.strip_prefix("scenario_"))
        .filter_map(|rest| rest.split('_').next().map(|number| number.trim_start_matches('0')));
    let all: Vec<_> = lettered.chain(scenarios).chain(named).map(str::to_owned).collect();
    all.into_iter()
}

#[test]
fn documents_name_what_exists() {
    let repository = Repository::new(all());
    let documents = repository.files.iter().filter(|file| file.kind == Kind::Markdown);
    let found: Vec<_> = documents.flat_map(|document| missing(&repository, document)).collect();
    expect_none(&found, "name what exists, or explain the number in docs/legend.md");
}

#[test]
fn legend_explains_each_scenario_that_is_tested() {
    let repository = Repository::new(all());
    let mut found = Vec::new();
    for file in repository.files.iter().filter(|file| file.kind == Kind::Rust) {
        for (at, name) in tests(file) {
            for number in
                numbers(name).filter(|number| !repository.explained.contains(number.as_str()))
            {
                found.push(Finding::new(file, at, format!("{name}: {number} is not in {LEGEND}")));
            }
        }
    }
    expect_none(&found, "explain the number in docs/legend.md");
}

/// A repository with one test, one module and a legend.
fn small() -> [File; 3] {
    let test = "#[test]\nfn reads_share_fetch() {}\n";
    [
        sample("tests/some.rs", test),
        sample("crates/vmem-core/src/object/some_gate.rs", "pub fn pass() {}"),
        sample(LEGEND, "| 12 | pinned |\n| P7 | bytes |\n"),
    ]
}

#[test]
fn missing_names_are_found_by_their_lines() {
    let text = "`tests/some.rs::reads_share_nothing`\n`tests/gone.rs`\n[a](gone.md)\n\
                scenario 13, I4\n`object/some_gate::gone`\n`cargo test --test gone`\n\
                `reads_share_nothing` in `nowhere.rs`\n";
    let document = sample("docs/a.md", text);
    let lines: Vec<_> = missing(&Repository::new(&small()), &document)
        .into_iter()
        .map(|found| found.line)
        .collect();
    assert_eq!(lines, [1, 2, 3, 4, 4, 5, 6, 7, 7]);
}

#[test]
fn names_that_exist_are_not_found() {
    let text = "`tests/some.rs::reads_share_fetch`, `object/some_gate::pass`, scenario 12, P7\n\
                `a/b`, `n / 2`, `scenario_12`, `cargo test --test some`\n\
                `reads_share_fetch` in `some_gate.rs`, `two_words`, `.rs`\n\n\
                ```\n`tests/gone.rs`\n```\n";
    let found = missing(&Repository::new(&small()), &sample("docs/a.md", text));
    assert!(found.is_empty(), "{found:?}");
}
