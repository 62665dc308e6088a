//! A tuple of names bound to a tuple of values saves a line and costs the reader a count.

use crate::files::{File, Kind, sample};
use crate::rust::code_of;
use crate::{Finding, everywhere, expect_none};

fn tuple_lets(file: &File) -> Vec<Finding> {
    if file.kind != Kind::Rust {
        return Vec::new();
    }
    let code = code_of(&file.pieces);
    let starts = code.match_indices("let (").map(|(at, _)| at).filter(|&at| {
        let before = code[..at].trim_end();
        let is_whole = !code[..at].ends_with(|letter: char| letter.is_alphanumeric());
        let is_condition = ["if", "while", "&&"].iter().any(|word| before.ends_with(word));
        is_whole && !is_condition
    });
    let only_saves = starts.filter(|&at| binds_a_literal(&code[at + "let ".len()..]));
    only_saves
        .map(|at| {
            let line = code[..at].matches('\n').count() + 1;
            Finding::new(file, line, "a tuple pattern bound to a tuple")
        })
        .collect()
}

/// Whether this is `(..) = (.., ..);`, which cannot fail.
fn binds_a_literal(text: &str) -> bool {
    let Some(pattern) = group(text) else { return false };
    let rest = text[pattern..].trim_start();
    // A type between the two changes nothing.
    let rest = match rest.strip_prefix(':').map(str::trim_start) {
        Some(types) => group(types).map_or("", |len| types[len..].trim_start()),
        None => rest,
    };
    let Some(value) = rest.strip_prefix('=').map(str::trim_start) else { return false };
    let Some(len) = group(value) else { return false };
    has_comma(&value[1..len - 1]) && value[len..].trim_start().starts_with(';')
}

/// The length of what stands in parentheses here, with them.
fn group(text: &str) -> Option<usize> {
    if !text.starts_with('(') {
        return None;
    }
    let mut depth = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// Whether there is a comma that is in no further brackets.
fn has_comma(text: &str) -> bool {
    let mut depth = 0;
    text.chars().any(|letter| {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && letter == ','
    })
}

#[test]
fn each_value_has_a_let_of_its_own() {
    expect_none(&everywhere(tuple_lets), "write one `let` for each value");
}

#[test]
fn tuple_bound_to_a_tuple_is_found() {
    let bad =
        "fn f() {\n    let (a, mut b) = (1, g(2, 3));\n    let (c, d): (u8, u8) = (1,\n 2);\n}\n";
    let found = tuple_lets(&sample("a.rs", bad));
    assert_eq!(found.iter().map(|found| found.line).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn tuple_that_something_returns_is_not_found() {
    let good = [
        "let (a, b) = f(1, 2);",
        "let (a, b) = (f)(1, 2);",
        "let (a, b) = (x, y).swap();",
        "let (a, b) = (f(1, 2));",
        "let (Some(a), Some(b)) = (x, y) else { return };",
        "if let (Some(a), Some(b)) = (x, y) { g(); }",
        "// let (a, b) = (1, 2);",
        "let s = \"let (a, b) = (1, 2);\";",
    ];
    for text in good {
        assert!(tuple_lets(&sample("a.rs", text)).is_empty(), "{text}");
    }
}
