//! Banned words: in comments, strings and documents, and as parts of names.
//!
//! Invariant: a phrase is found across the lines of one paragraph, and never across the end of a
//! clause.

use crate::files::{File, Kind, sample};
use crate::rust::Part;
use crate::words::{PHRASES, WORDS};
use crate::{Finding, everywhere, expect_none};

/// A word of a text; an empty one ends a clause.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    text: String,
    line: usize,
}

/// The words that people read: of comments, literals and documents.
fn prose(file: &File) -> Vec<Word> {
    let mut found = Vec::new();
    end(1, &mut found);
    if file.kind != Kind::Rust {
        let mut is_glossary = false;
        for (at, line) in file.lines() {
            // The one place that names what is not to be said.
            is_glossary =
                if line.starts_with('#') { line.ends_with("Glossary") } else { is_glossary };
            if !is_glossary {
                words(&without_paths(line), at, &mut found);
            }
        }
        return found;
    }
    let mut next_line = 0;
    for piece in file.pieces.iter().filter(|piece| piece.part != Part::Code) {
        // Comments on lines that follow each other are one text.
        if piece.part == Part::Literal || piece.line != next_line {
            end(piece.line, &mut found);
        }
        next_line = piece.line + 1;
        for (at, line) in piece.text.lines().enumerate() {
            let line = line.trim_start_matches(['/', '!', '*', ' ']);
            words(line, piece.line + at, &mut found);
        }
    }
    found
}

/// A line of a document without the paths and tests that it names: those are checked where they
/// are, and others than their text may be left for later.
fn without_paths(line: &str) -> String {
    let line = line.trim_start_matches(['#', '>', ' ']);
    let is_path = |quoted: &str| quoted.contains("::") || quoted.contains('/');
    let kept = line.split('`').enumerate().filter(|(at, part)| at % 2 == 0 || !is_path(part));
    kept.map(|(_, part)| part).collect::<Vec<_>>().join("`")
}

/// The names of the code.
fn names(file: &File) -> Vec<Word> {
    let mut found = Vec::new();
    for piece in file.pieces.iter().filter(|piece| piece.part == Part::Code) {
        for (at, line) in piece.text.split('\n').enumerate() {
            words(line, piece.line + at, &mut found);
        }
    }
    found
}

/// Adds the words of a line. An empty line ends a clause, and so does punctuation.
fn words(line: &str, at: usize, found: &mut Vec<Word>) {
    if line.is_empty() {
        end(at, found);
    }
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let mut rest = line;
    while let Some(letter) = rest.chars().next() {
        let len = rest.find(|letter| !is_word(letter)).unwrap_or(rest.len());
        if len > 0 {
            found.push(Word { text: rest[..len].to_owned(), line: at });
            rest = &rest[len..];
            continue;
        }
        if !matches!(letter, ' ' | '`' | '-' | '*' | '\\' | '"') {
            end(at, found);
        }
        rest = &rest[letter.len_utf8()..];
    }
}

fn end(at: usize, found: &mut Vec<Word>) {
    found.push(Word { text: String::new(), line: at });
}

/// Where a phrase begins in these words.
fn matches(phrase: &str, words: &[Word]) -> Vec<usize> {
    let parts: Vec<Vec<&str>> = phrase.split(' ').map(|part| part.split('|').collect()).collect();
    let starts = (0..words.len()).filter(|&at| fits(&parts, &words[at..]));
    starts.map(|at| words[at].line).collect()
}

/// Whether the words begin with these parts of a phrase.
fn fits(parts: &[Vec<&str>], words: &[Word]) -> bool {
    let Some((part, parts)) = parts.split_first() else { return true };
    if part[..] == ["~"] {
        let clause = words.iter().take(3).take_while(|word| !word.text.is_empty()).count();
        return (0..=clause).any(|gap| fits(parts, &words[gap..]));
    }
    let Some((word, words)) = words.split_first() else { return false };
    let is_not = part[0].starts_with('!');
    let is_any = |part: &&str| word.text.eq_ignore_ascii_case(part.trim_start_matches('!'));
    part.iter().any(is_any) != is_not && fits(parts, words)
}

/// Words and names cut at `_` and at capitals.
fn segments(words: &[Word]) -> Vec<Word> {
    let mut found = Vec::new();
    for word in words {
        for part in word.text.split('_') {
            let mut start = 0;
            let mut before = ' ';
            for (at, letter) in part.char_indices() {
                if letter.is_uppercase() && before.is_lowercase() {
                    found.push(Word { text: part[start..at].to_owned(), line: word.line });
                    start = at;
                }
                before = letter;
            }
            found.push(Word { text: part[start..].to_owned(), line: word.line });
        }
    }
    found
}

pub(crate) fn banned(file: &File) -> Vec<Finding> {
    // The table of words, and the samples of rules.
    if file.path.starts_with("tests/tidy/") {
        return Vec::new();
    }
    let prose = prose(file);
    let all = segments(&[prose.clone(), names(file)].concat());
    let tables = [(PHRASES, &prose), (WORDS, &all)];
    let mut found = Vec::new();
    for (table, words) in tables {
        for (phrase, instead) in table {
            let places = matches(phrase, words).into_iter();
            found.extend(
                places.map(|at| Finding::new(file, at, format!("\"{phrase}\": {instead}"))),
            );
        }
    }
    found
}

#[test]
fn words_are_those_of_the_glossary() {
    let remedy = "reword it; the glossary of CONTRIBUTING.md has the words that we use";
    expect_none(&everywhere(banned), remedy);
}

/// The lines at which something is found in a sample.
fn lines(path: &str, text: &str) -> Vec<usize> {
    banned(&sample(path, text)).into_iter().map(|found| found.line).collect()
}

#[test]
fn phrase_is_found_across_the_lines_of_a_comment() {
    assert_eq!(lines("a.rs", "/// At most so\n/// many bytes.\nfn f() {}\n"), [1]);
    assert_eq!(lines("a.rs", "// At most so\nf();\n// many bytes.\n"), []);
    assert_eq!(lines("a.rs", "/// Less so.\n///\n/// Many bytes.\nfn f() {}\n"), []);
    assert_eq!(lines("a.rs", "// It brings the object\n// up, and goes.\n// Down it is.\n"), [1]);
}

#[test]
fn actor_without_a_noun_is_found() {
    assert_eq!(lines("a.rs", "// The end.\n// Who waits is woken.\n"), [1]);
    assert_eq!(lines("a.rs", "// It serves those who\n// wait, and whoever asks.\n"), [2, 1]);
    assert_eq!(lines("a.rs", "// Users who poll once, and a user who\n// never does.\n"), []);
    assert_eq!(lines("a.md", "Who waits is woken.\n"), [1]);
}

#[test]
fn banned_word_is_found_in_names_and_messages() {
    assert_eq!(lines("a.rs", "\nfn host_room() {\n    panic!(\"no room\");\n}\n"), [3, 2]);
    assert_eq!(lines("a.rs", "struct NoRoom;\nstruct Mushroom;\n"), [1]);
    assert_eq!(lines("a.rs", "let he = 1; // The word is code here.\n"), []);
}

#[test]
fn banned_word_is_found_in_documents_but_not_in_the_glossary() {
    assert_eq!(
        lines("a.md", "# A\n\nHe waits.\n\n## Glossary\n\nnot he\n\n## More\n\nhis\n"),
        [3, 11]
    );
    assert_eq!(lines("a.sh", "# Not to be\n# had.\n"), [1]);
}
