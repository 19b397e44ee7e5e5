//! Just enough of Rust's lexical rules to tell code from comments, strings
//! and tests.

use std::ops::Range;

/// A source file with its comments and literals blanked out.
#[derive(Debug)]
pub(crate) struct RustSource<'a> {
    /// The file.
    pub(crate) text: &'a str,
    /// The same, byte for byte in the same place, but with spaces for comments
    /// and for what is inside quotes.
    pub(crate) code: String,
    /// The parts under `#[cfg(test)]`.
    tests: Vec<Range<usize>>,
}

impl<'a> RustSource<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        let code = blank(text);
        let tests = test_parts(&code);
        Self { text, code, tests }
    }

    /// The line (from 1) of a byte.
    pub(crate) fn line(&self, at: usize) -> usize {
        1 + self.text.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count()
    }

    pub(crate) fn is_test(&self, at: usize) -> bool {
        self.tests.iter().any(|part| part.contains(&at))
    }

    /// Where `word` stands in the code, not as a part of a longer name.
    pub(crate) fn find(&self, word: &str) -> Vec<usize> {
        let code = self.code.as_bytes();
        let (first, last) = (word.as_bytes()[0], word.as_bytes()[word.len() - 1]);
        self.code
            .match_indices(word)
            .map(|(at, _)| at)
            .filter(|&at| {
                let before = at.checked_sub(1).map(|i| code[i]);
                let after = code.get(at + word.len()).copied();
                let joins = |a: u8, b: Option<u8>| is_name(a) && b.is_some_and(is_name);
                !joins(first, before) && !joins(last, after)
            })
            .collect()
    }

    /// Modules declared as `#[cfg(test)] mod NAME;`.
    pub(crate) fn test_modules(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().filter_map(|part| {
            let item = self.code[part.clone()].strip_suffix(';')?;
            item.rsplit_once("mod ").map(|(_, name)| name.trim())
        })
    }
}

fn is_name(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let (skip, quote) = token(bytes, at);
        // The quotes stay, so that what was a literal is still seen as one.
        let inside = at + quote..(at + skip).saturating_sub(quote).max(at + quote);
        if skip > 1 && !is_name(bytes[at]) || quote > 0 {
            for b in &mut code[inside] {
                if *b != b'\n' {
                    *b = b' ';
                }
            }
        }
        at += skip;
    }
    String::from_utf8(code).unwrap_or_default()
}

/// The length of what starts here, and how much of each end to keep. A name
/// is taken whole, so that the `r` of `for` never starts a raw string.
fn token(bytes: &[u8], at: usize) -> (usize, usize) {
    let rest = &bytes[at..];
    match rest {
        [b'/', b'/', ..] => (until(rest, b"\n"), 0),
        [b'/', b'*', ..] => (block_comment(rest), 0),
        [b'"', ..] => (string(rest), 1),
        [b'\'', ..] => match char_literal(rest) {
            0 => (1, 0), // a lifetime
            len => (len, 1),
        },
        [first, ..] if is_name(*first) => {
            let name = rest.iter().take_while(|&&b| is_name(b)).count();
            let hashes = rest[name..].iter().take_while(|&&b| b == b'#').count();
            let raw = matches!(&rest[..name], b"r" | b"br" | b"cr");
            if raw && rest.get(name + hashes) == Some(&b'"') {
                let close = [b"\"", "#".repeat(hashes).as_bytes()].concat();
                let open = name + hashes + 1;
                (open + until(&rest[open..], &close) + close.len(), close.len().max(open))
            } else {
                (name, 0)
            }
        }
        _ => (1, 0),
    }
}

/// Bytes before `end`, or all.
fn until(rest: &[u8], end: &[u8]) -> usize {
    rest.windows(end.len()).position(|w| w == end).unwrap_or(rest.len())
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] if depth == 1 => return at + 2,
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    rest.len()
}

fn string(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// The length of the char literal that starts here; 0 if it is a lifetime.
fn char_literal(rest: &[u8]) -> usize {
    match rest {
        [_, b'\\', _, tail @ ..] => 3 + until(tail, b"'") + 1,
        [_, first, ..] => {
            let len = match first {
                0..0x80 => 1,
                0x80..0xe0 => 2,
                0xe0..0xf0 => 3,
                _ => 4,
            };
            if rest.get(1 + len) == Some(&b'\'') { len + 2 } else { 0 }
        }
        _ => 0,
    }
}

/// Each item under `#[cfg(test)]`, attribute included.
fn test_parts(code: &str) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    for attribute in ["#[cfg(test)]", "#[cfg(all(test,"] {
        for (start, _) in code.match_indices(attribute) {
            parts.push(start..start + item_len(&code.as_bytes()[start..]));
        }
    }
    parts
}

/// Up to the item's closing brace, or its semicolon outside all brackets.
fn item_len(code: &[u8]) -> usize {
    let (mut braces, mut others) = (0_usize, 0_usize);
    for (i, b) in code.iter().enumerate() {
        match b {
            b'(' | b'[' => others += 1,
            b')' | b']' => others = others.saturating_sub(1),
            b'{' => braces += 1,
            // The pattern of a match arm is not the end of it.
            b'}' if braces <= 1 && !code[i + 1..].trim_ascii_start().starts_with(b"=>") => {
                return i + 1;
            }
            b'}' => braces = braces.saturating_sub(1),
            b';' if braces + others == 0 => return i + 1,
            _ => (),
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> String {
        let source = RustSource::new(text);
        assert_eq!(source.code.len(), text.len());
        source.code
    }

    #[test]
    fn comments_and_literals_are_blanked() {
        assert_eq!(code("a // b\nc"), "a     \nc");
        assert_eq!(code("a /* b /* c */ d */ e"), "a                   e");
        assert_eq!(code(r#"f("un\"safe", x)"#), r#"f("        ", x)"#);
        assert_eq!(code("'\"' + '\\'' + 'x' + '\u{e9}' + y"), "' ' + '  ' + ' ' + '  ' + y");
        assert_eq!(code("b\"x\" b'x'"), "b\" \" b' '");
    }

    #[test]
    fn raw_strings_end_where_they_end() {
        let text = "r#\"un\" safe\"# + todo";
        assert!(code(text).ends_with(" + todo"));
        assert!(!code(text).contains("safe"));
        assert!(!code("br\"unsafe\"").contains("unsafe"));
        assert_eq!(code("for \"x\""), "for \" \"");
    }

    #[test]
    fn lifetimes_are_no_literals() {
        assert_eq!(code("fn f<'a>(x: &'a str, y: &'a u8)"), "fn f<'a>(x: &'a str, y: &'a u8)");
    }

    #[test]
    fn whole_words_only() {
        let source = RustSource::new("unsafe_code unsafe {} not_unsafe x.unwrap() unwrap_or");
        assert_eq!(source.find("unsafe"), [12]);
        assert_eq!(source.find(".unwrap()").len(), 1);
    }

    #[test]
    fn test_items_end_where_they_end() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { \"}\" } }\nfn c() {}\n\
                    #[cfg(test)] use x::[u8; 4];\nfn d() {}\n#[cfg(not(test))] fn e() {}";
        let source = RustSource::new(text);
        let is_test = |name: &str| source.is_test(text.find(name).unwrap());
        let seen: Vec<bool> =
            ["fn a", "fn b", "fn c", "use x", "fn d", "fn e"].map(is_test).to_vec();
        assert_eq!(seen, [false, true, false, true, false, false]);
        assert_eq!(source.line(text.find("fn b").unwrap()), 3);
    }

    #[test]
    fn a_match_arm_is_an_item() {
        let text = "match x {\n#[cfg(test)]\nA { a } => { one }\nB { b } => { two }\n}";
        let source = RustSource::new(text);
        assert!(source.is_test(text.find("one").unwrap()));
        assert!(!source.is_test(text.find("two").unwrap()));
    }

    #[test]
    fn test_modules_in_files_of_their_own() {
        let source =
            RustSource::new("#[cfg(test)]\nmod checks;\nmod other;\n#[cfg(test)] mod t {}");
        assert_eq!(source.test_modules().collect::<Vec<_>>(), ["checks"]);
    }
}
