//! The glossary of `CONTRIBUTING.md` and the tables of refused words agree.
//!
//! Invariant: each word that the glossary does not want is refused, or has another meaning that
//! `ELSEWHERE` names. A row is `| term | meaning | not |`, with commas between the words of the
//! last column.

use crate::files::{File, all, sample};
use crate::prose::banned;
use crate::words::ELSEWHERE;
use crate::{Finding, expect_none};

/// The words of the last column, with their lines. What begins with "where" is a remark.
fn unwanted(file: &File) -> Vec<(usize, &str)> {
    let mut is_glossary = false;
    let mut found = Vec::new();
    for (at, line) in file.lines() {
        is_glossary = if line.starts_with('#') { line == "## Glossary" } else { is_glossary };
        let columns: Vec<_> = line.split('|').map(str::trim).collect();
        let &[_, _, _, words, _] = &columns[..] else { continue };
        if is_glossary && !matches!(words, "not" | "---") {
            found.extend(words.split(", ").map(|word| (at, word)));
        }
    }
    found.retain(|(_, word)| !word.starts_with("where "));
    found
}

/// Whether the rule of words finds this one in a sentence.
fn is_refused(word: &str) -> bool {
    let sentence = format!("// They {word} the object.\n");
    !banned(&sample("a.rs", &sentence)).is_empty()
}

fn neither_refused_nor_excused(file: &File) -> Vec<Finding> {
    let is_excused = |word: &str| ELSEWHERE.iter().any(|(kept, _)| *kept == word);
    let words = unwanted(file).into_iter();
    let lost = words.filter(|(_, word)| !is_refused(word) && !is_excused(word));
    lost.map(|(at, word)| Finding::new(file, at, format!("\"{word}\" is not refused"))).collect()
}

#[test]
fn words_outside_the_glossary_are_refused() {
    let glossary = all().iter().find(|file| file.path == "CONTRIBUTING.md");
    let glossary = glossary.expect("the glossary is in CONTRIBUTING.md");
    assert!(unwanted(glossary).len() > 20, "the glossary has rows");
    let remedy = "refuse it in `PHRASES` or `WORDS`, or enter it in `ELSEWHERE` with the reason";
    expect_none(&neither_refused_nor_excused(glossary), remedy);
}

#[test]
fn excused_words_stand_in_the_glossary_with_reasons() {
    for (word, reason) in ELSEWHERE {
        let stands = |file: &File| unwanted(file).iter().any(|(_, other)| other == word);
        assert!(all().iter().any(stands), "{word} is no longer in the glossary");
        assert!(reason.len() > 10 && !is_refused(word), "{word}: {reason}");
    }
}

#[test]
fn glossary_word_that_no_rule_refuses_is_found() {
    let glossary = "## Glossary\n\n| term | meaning | not |\n|---|---|---|\n\
                    | space | bytes | room |\n| budget | bytes | purse, lock, where it is |\n\
                    ## More\n\n| a | b | till |\n";
    let found: Vec<_> = neither_refused_nor_excused(&sample("a.md", glossary))
        .into_iter()
        .map(|found| (found.line, found.what))
        .collect();
    assert_eq!(found, [(6, "\"purse\" is not refused".to_owned())]);
}
