//! Texts from and for people: invisible characters, and the length of error texts.

use serde::{Deserialize, Deserializer};

/// The longest error text, in characters: in responses, webhooks, and recorded attempts.
pub const MAX_ERROR_CHARS: usize = 1000;
/// How many characters of a text an error quotes.
const QUOTED_CHARS: usize = 100;

/// Characters that are invisible, or that look like a plain space, with their Unicode names.
const INVISIBLE: [(char, &str); 25] = [
    ('\u{a0}', "NO-BREAK SPACE"),
    ('\u{ad}', "SOFT HYPHEN"),
    ('\u{61c}', "ARABIC LETTER MARK"),
    ('\u{180e}', "MONGOLIAN VOWEL SEPARATOR"),
    ('\u{2007}', "FIGURE SPACE"),
    ('\u{2009}', "THIN SPACE"),
    ('\u{200b}', "ZERO WIDTH SPACE"),
    ('\u{200c}', "ZERO WIDTH NON-JOINER"),
    ('\u{200d}', "ZERO WIDTH JOINER"),
    ('\u{200e}', "LEFT-TO-RIGHT MARK"),
    ('\u{200f}', "RIGHT-TO-LEFT MARK"),
    ('\u{2028}', "LINE SEPARATOR"),
    ('\u{2029}', "PARAGRAPH SEPARATOR"),
    ('\u{202a}', "LEFT-TO-RIGHT EMBEDDING"),
    ('\u{202b}', "RIGHT-TO-LEFT EMBEDDING"),
    ('\u{202c}', "POP DIRECTIONAL FORMATTING"),
    ('\u{202d}', "LEFT-TO-RIGHT OVERRIDE"),
    ('\u{202e}', "RIGHT-TO-LEFT OVERRIDE"),
    ('\u{202f}', "NARROW NO-BREAK SPACE"),
    ('\u{2060}', "WORD JOINER"),
    ('\u{2066}', "LEFT-TO-RIGHT ISOLATE"),
    ('\u{2067}', "RIGHT-TO-LEFT ISOLATE"),
    ('\u{2068}', "FIRST STRONG ISOLATE"),
    ('\u{2069}', "POP DIRECTIONAL ISOLATE"),
    ('\u{feff}', "ZERO WIDTH NO-BREAK SPACE"),
];

/// Whether a character takes no space on the screen. Such a character does not change the meaning of a text.
pub fn is_zero_width(c: char) -> bool {
    !c.is_whitespace() && INVISIBLE.iter().any(|(invisible, _)| *invisible == c)
}

/// Whether a character is invisible or looks like a plain space without being one.
pub fn is_invisible(c: char) -> bool {
    c.is_control() || INVISIBLE.iter().any(|(invisible, _)| *invisible == c)
}

/// The text without whitespace, zero-width characters and direction marks at its ends.
pub fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || is_zero_width(c))
}

/// Reads and trims a lead's external id, so that an invisible character does not create a second lead. An id without
/// other characters is absent.
pub(crate) fn reference_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.map(|text| trim(&text).to_owned()).filter(|text| !text.is_empty()))
}

/// Names a character: `U+200B ZERO WIDTH SPACE`, or `U+0078 'x'` if it is visible.
pub fn name_char(c: char) -> String {
    let number = u32::from(c);
    match INVISIBLE.iter().find(|(invisible, _)| *invisible == c) {
        Some((_, name)) => format!("U+{number:04X} {name}"),
        None if c == ' ' => "U+0020 SPACE".into(),
        None if c.is_control() || c.is_whitespace() => format!("U+{number:04X}"),
        None => format!("U+{number:04X} {c:?}"),
    }
}

/// The first characters of a text.
pub fn prefix(text: &str, max_chars: usize) -> &str {
    text.char_indices().nth(max_chars).map_or(text, |(end, _)| &text[..end])
}

/// The beginning of a text in quotes, with its invisible characters escaped.
pub fn quoted(text: &str) -> String {
    match prefix(text, QUOTED_CHARS) {
        whole if whole.len() == text.len() => format!("{whole:?}"),
        start => format!("{start:?}…"),
    }
}

/// An error text of at most [`MAX_ERROR_CHARS`] characters.
pub fn bounded_error(text: impl Into<String>) -> String {
    let mut text = text.into();
    if text.chars().nth(MAX_ERROR_CHARS).is_some() {
        text.truncate(prefix(&text, MAX_ERROR_CHARS - 1).len());
        text.push('…');
    }
    text
}

/// Several faults as one error text, which also counts the faults that are left out.
pub fn join_faults(faults: &[String]) -> String {
    let mut text = String::new();
    for (index, fault) in faults.iter().enumerate() {
        let more = format!("; and {} more", faults.len() - index);
        let separator = if index == 0 { "" } else { "; " };
        let chars = [&text, separator, fault, &more].iter().map(|part| part.chars().count()).sum::<usize>();
        if index > 0 && chars > MAX_ERROR_CHARS {
            return text + &more;
        }
        text = text + separator + &bounded_error(fault.as_str());
    }
    bounded_error(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invisible_characters_are_trimmed_at_the_ends_and_named() {
        assert_eq!(trim("\u{feff}\u{202a} A\u{a0}B \u{202c}\u{200b}\t"), "A\u{a0}B");
        for (c, name) in [
            ('\u{200b}', "U+200B ZERO WIDTH SPACE"),
            (' ', "U+0020 SPACE"),
            ('\t', "U+0009"),
            ('\u{2003}', "U+2003"),
            ('x', "U+0078 'x'"),
        ] {
            assert_eq!(name_char(c), name);
        }
        assert!(INVISIBLE.is_sorted() && INVISIBLE.iter().all(|(c, _)| is_invisible(*c)));
    }

    #[test]
    fn error_texts_are_bounded() {
        assert_eq!(bounded_error("short"), "short");
        assert_eq!(bounded_error("ä".repeat(MAX_ERROR_CHARS)), "ä".repeat(MAX_ERROR_CHARS));
        let long = bounded_error("ä".repeat(MAX_ERROR_CHARS + 1));
        assert!(long.chars().count() == MAX_ERROR_CHARS && long.ends_with("ä…"), "{long}");
        assert_eq!(quoted("a\u{a0}"), r#""a\u{a0}""#);
        assert_eq!(quoted(&"x".repeat(200)), format!("\"{}\"…", "x".repeat(100)));
    }

    #[test]
    fn faults_that_do_not_fit_are_counted() {
        assert_eq!(join_faults(&["a".into(), "b".into()]), "a; b");
        let faults: Vec<_> = (0..5000).map(|n| format!("transitions: \"state {n}\" is not among the states")).collect();
        let text = join_faults(&faults);
        assert!(text.chars().count() <= MAX_ERROR_CHARS, "{text}");
        let shown = text.matches("not among").count();
        assert!(text.ends_with(&format!("; and {} more", 5000 - shown)), "{text}");
        assert_eq!(join_faults(&["x".repeat(5000)]).chars().count(), MAX_ERROR_CHARS);
    }
}
