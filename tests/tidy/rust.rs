//! Tells code, comments and strings of a Rust file apart.
//!
//! Invariant: the pieces, one behind the other, are the text. A comment ends with its line, unless
//! it is a block.

/// What a piece of text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Code,
    Comment,
    /// A string or character, with its quotes.
    Literal,
}

/// A piece of a file that is one thing throughout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) part: Part,
    /// Where it begins.
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// All pieces of this text.
pub(crate) fn pieces(text: &str) -> Vec<Piece> {
    let mut found = Vec::new();
    let mut line = 1;
    let mut code = 0;
    let mut at = 0;
    let mut push = |part, piece: &str| {
        if !piece.is_empty() {
            found.push(Piece { part, line, text: piece.to_owned() });
            line += piece.matches('\n').count();
        }
    };
    while at < text.len() {
        let rest = &text[at..];
        let before = text[..at].chars().next_back();
        match other_than_code(rest, before) {
            Some((part, len)) => {
                push(Part::Code, &text[code..at]);
                push(part, &rest[..len]);
                at += len;
                code = at;
            }
            None => at += rest.chars().next().map_or(1, char::len_utf8),
        }
    }
    push(Part::Code, &text[code..]);
    found
}

/// The text with all but code blanked: the same length, the same lines.
pub(crate) fn code_of(pieces: &[Piece]) -> String {
    let blank =
        |letter: char| if letter == '\n' { "\n".to_owned() } else { " ".repeat(letter.len_utf8()) };
    let shown = |piece: &Piece| match piece.part {
        Part::Code => piece.text.clone(),
        Part::Comment => piece.text.chars().map(blank).collect(),
        // Not blank, since it is a value.
        Part::Literal => piece.text.chars().map(blank).collect::<String>().replace(' ', "0"),
    };
    pieces.iter().map(shown).collect()
}

/// What begins here, if it is not code, and its length.
fn other_than_code(rest: &str, before: Option<char>) -> Option<(Part, usize)> {
    if rest.starts_with("//") {
        return Some((Part::Comment, rest.find('\n').unwrap_or(rest.len())));
    }
    if rest.starts_with("/*") {
        return Some((Part::Comment, block_len(rest)));
    }
    if rest.starts_with('"') {
        return Some((Part::Literal, quoted_len(rest, '"')));
    }
    if rest.starts_with('\'') {
        // A lifetime has no second quote behind one character.
        let mut chars = rest.chars().skip(1);
        let is_character = chars.next() == Some('\\') || chars.next() == Some('\'');
        return is_character.then(|| (Part::Literal, quoted_len(rest, '\'')));
    }
    let in_name = before.is_some_and(|before| before.is_alphanumeric() || before == '_');
    raw_len(rest).filter(|_| !in_name).map(|len| (Part::Literal, len))
}

/// The length of a comment between `/*` and `*/`, which nests.
fn block_len(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        let step = &rest[at..];
        if step.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if step.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += step.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// The length of what stands between two of these quotes, with them.
fn quoted_len(rest: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, letter) in rest.char_indices().skip(1) {
        match letter {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            _ if letter == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The length of a raw string that begins here.
fn raw_len(rest: &str) -> Option<usize> {
    let prefix = ["br", "cr", "r"].into_iter().find(|prefix| rest.starts_with(prefix))?;
    let hashes = rest[prefix.len()..].chars().take_while(|&letter| letter == '#').count();
    let body = prefix.len() + hashes;
    let inside = rest[body..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(inside.find(&end).map_or(rest.len(), |at| body + 1 + at + end.len()))
}

mod tests {
    use super::*;

    fn parts(text: &str) -> Vec<(Part, &str)> {
        let joined: String = pieces(text).into_iter().map(|piece| piece.text).collect();
        assert_eq!(joined, text);
        let mut rest = text;
        let mut take = |piece: Piece| {
            let (this, behind) = rest.split_at(piece.text.len());
            rest = behind;
            (piece.part, this)
        };
        pieces(text).into_iter().map(&mut take).collect()
    }

    #[test]
    fn comments_and_strings_are_told_from_code() {
        let found = parts("let a = \"// no \\\" end\"; // yes \"\nlet b<'a> = 'x';");
        let other: Vec<_> = found.into_iter().filter(|(part, _)| *part != Part::Code).collect();
        assert_eq!(
            other,
            [
                (Part::Literal, "\"// no \\\" end\""),
                (Part::Comment, "// yes \""),
                (Part::Literal, "'x'")
            ]
        );
    }

    #[test]
    fn raw_strings_and_blocks_end_where_they_end() {
        let found = parts("r#\"a \" b\"# /* one /* two */ \" */ for r in 0..'\\''");
        let other: Vec<_> = found.into_iter().filter(|(part, _)| *part != Part::Code).collect();
        assert_eq!(
            other,
            [
                (Part::Literal, "r#\"a \" b\"#"),
                (Part::Comment, "/* one /* two */ \" */"),
                (Part::Literal, "'\\''")
            ]
        );
    }

    #[test]
    fn pieces_know_their_lines() {
        let lines: Vec<_> =
            pieces("a\n// b\n\n\"c\nd\" e // f").into_iter().map(|p| p.line).collect();
        assert_eq!(lines, [1, 2, 2, 4, 5, 5]);
    }
}
