//! What is traced is documented: each target, with its level and its fields.
//!
//! Invariant: the table of `docs/seeing.md` has a row for each target and level of the sources, and
//! no other; the names in backquotes in its last column are the fields that the sources give. A
//! span is a row of its own. Emulators and tools of tests are no sources here.

use std::collections::{BTreeMap, BTreeSet};

use crate::files::{File, Kind, all, sample};
use crate::rust::Part;
use crate::{Finding, expect_none};

/// Where the table is.
const TABLE: &str = "docs/seeing.md";
/// The sources that no service links.
const TOOLS: &[&str] = &["vmem-testkit", "vmem-cuda-emulator", "vmem-gpu-check"];

/// A target, and how it is traced: `warn`, or `span, debug`.
type Key = (String, String);

/// One call of a macro of `tracing`.
#[derive(Debug)]
struct Call {
    line: usize,
    /// None if it names no target, which is its module then.
    target: Option<String>,
    level: String,
    fields: BTreeSet<String>,
}

/// A file as code, in which each literal is its number, in quotes.
struct Code<'a> {
    text: String,
    literals: Vec<&'a str>,
    /// Where in `text` a line begins that is known.
    lines: Vec<(usize, usize)>,
}

impl<'a> Code<'a> {
    fn of(file: &'a File) -> Self {
        let mut code = Code { text: String::new(), literals: Vec::new(), lines: Vec::new() };
        for piece in &file.pieces {
            code.lines.push((code.text.len(), piece.line));
            match piece.part {
                Part::Code => code.text += &piece.text,
                Part::Literal => {
                    code.text += &format!("\"{}\"", code.literals.len());
                    code.literals.push(piece.text.trim_matches('"'));
                }
                Part::Comment => {}
            }
        }
        code
    }

    fn line(&self, at: usize) -> usize {
        let known = self.lines.partition_point(|&(begin, _)| begin <= at);
        let (begin, line) = self.lines[known - 1];
        line + self.text[begin..at].matches('\n').count()
    }

    /// What a literal of the code says; none if this is something else.
    fn literal(&self, argument: &str) -> Option<&'a str> {
        let number = argument.strip_prefix('"')?.strip_suffix('"')?;
        self.literals.get(number.parse::<usize>().ok()?).copied()
    }

    fn calls(&self) -> Vec<Call> {
        let mut found = Vec::new();
        for (at, _) in self.text.match_indices("tracing::") {
            let rest = &self.text[at + "tracing::".len()..];
            let Some((name, rest)) = rest.split_once("!(") else { continue };
            let (level, is_span) = match name.strip_suffix("_span") {
                Some(level) => (level, true),
                None => (name, false),
            };
            if ["error", "warn", "info", "debug", "trace"].contains(&level) {
                found.push(self.call(self.line(at), level, is_span, arguments(rest)));
            }
        }
        found
    }

    fn call(&self, line: usize, level: &str, is_span: bool, arguments: Vec<&str>) -> Call {
        let mut fields = BTreeSet::new();
        let mut target = None;
        let is_field = |argument: &&str| !argument.starts_with("parent:");
        for argument in arguments.into_iter().filter(is_field) {
            if let Some(named) = argument.strip_prefix("target:") {
                target = self.literal(named.trim()).map(str::to_owned);
            } else if argument.starts_with('"') {
                // Behind the message are its values; behind the name of a span, the fields.
                if !is_span {
                    break;
                }
            } else {
                let value = argument.split('=').next().unwrap_or_default();
                let name = value.trim().trim_start_matches(['%', '?']).rsplit('.').next();
                fields.extend(name.filter(|name| !name.is_empty()).map(str::to_owned));
            }
        }
        let level = if is_span { format!("span, {level}") } else { level.to_owned() };
        Call { line, target, level, fields }
    }
}

/// The arguments of a call whose parenthesis is open.
fn arguments(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut depth = 0;
    let mut begin = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' if depth == 0 => {
                found.push(text[begin..at].trim());
                break;
            }
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(text[begin..at].trim());
                begin = at + 1;
            }
            _ => {}
        }
    }
    found
}

fn is_source(file: &File) -> bool {
    let in_crate = file.path.strip_prefix("crates/").is_some_and(|path| {
        path.contains("/src/") && !TOOLS.iter().any(|tool| path.starts_with(tool))
    });
    file.kind == Kind::Rust && (in_crate || file.path.starts_with("src/"))
}

/// The rows of the table, with their lines and the fields that they name.
fn rows(file: &File) -> BTreeMap<Key, (usize, BTreeSet<String>)> {
    let mut found = BTreeMap::new();
    for (at, line) in file.lines() {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let &[target, level, _, fields] = cells.as_slice() else { continue };
        let Some(target) = quoted(target).into_iter().next() else { continue };
        if target == "vmem" || target.starts_with("vmem::") {
            found.insert((target, level.to_owned()), (at, quoted(fields)));
        }
    }
    found
}

/// The names in backquotes.
fn quoted(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn faults(files: &[File]) -> Vec<Finding> {
    let Some(table) = files.iter().find(|file| file.path == TABLE) else { return Vec::new() };
    let rows = rows(table);
    let mut found = Vec::new();
    let mut traced = BTreeMap::<Key, BTreeSet<String>>::new();
    for file in files.iter().filter(|file| is_source(file)) {
        for call in Code::of(file).calls() {
            let Some(target) = call.target else {
                found.push(Finding::new(file, call.line, "traced without a target"));
                continue;
            };
            let key = (target, call.level);
            if !rows.contains_key(&key) {
                let what = format!("{} at {} is not in {TABLE}", key.0, key.1);
                found.push(Finding::new(file, call.line, what));
            }
            traced.entry(key).or_default().extend(call.fields);
        }
    }
    for (key, (line, fields)) in &rows {
        let (target, level) = key;
        match traced.get(key) {
            None => found.push(Finding::new(
                table,
                *line,
                format!("nothing traces {target} at {level}"),
            )),
            Some(given) if given != fields => {
                let what = format!("{target} at {level} has the fields {given:?}, not {fields:?}");
                found.push(Finding::new(table, *line, what));
            }
            Some(_) => {}
        }
    }
    found
}

#[test]
fn table_has_each_target_with_level_and_fields() {
    let remedy = "give the target, and bring the table of docs/seeing.md up to the sources";
    expect_none(&faults(all()), remedy);
}

#[test]
fn calls_and_rows_that_differ_are_found() {
    let source = [
        "fn a() {",
        "    tracing::warn!(\"no target\");",
        "    // tracing::warn!(\"a comment\");",
        "    tracing::debug!(",
        "        target: \"vmem::a\", id, %self.error, n = f(1, 2),",
        "        \"{}, told\", x",
        "    );",
        "    tracing::error!(target: \"vmem::b\", \"new\");",
        "    let s = tracing::debug_span!(target: \"vmem::c\", \"name\", op = \"x\");",
        "}",
    ];
    let table = "| target | level | what | fields |\n|---|---|---|---|\n\
                 | `vmem::a` | debug | all is well | `id`, `error`, `n` (one, two) |\n\
                 | `vmem::c` | span, debug | another field | `operation` |\n\
                 | `vmem::d` | warn | nothing traces it | - |\n";
    let files = [
        sample("crates/vmem-core/src/a.rs", &source.join("\n")),
        sample("crates/vmem-testkit/src/a.rs", "fn a() { tracing::warn!(\"a tool\"); }"),
        sample(TABLE, table),
    ];
    let found = faults(&files);
    let places: Vec<_> = found.iter().map(|found| (found.path.as_str(), found.line)).collect();
    let source = "crates/vmem-core/src/a.rs";
    assert_eq!(places, [(source, 2), (source, 8), (TABLE, 4), (TABLE, 5)], "{found:?}");
}
