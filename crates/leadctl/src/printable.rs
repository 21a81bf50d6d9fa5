//! What strangers wrote, so that a terminal shows it and does not act on it.

/// How much of a line is shown.
const LINE_CHARS: usize = 1024;

/// One line: every control character is escaped, and what is too long is cut.
pub(crate) fn line(text: &str) -> String {
    let mut escaped: String = escape(text.chars().take(LINE_CHARS), &[]);
    if text.chars().nth(LINE_CHARS).is_some() {
        escaped.push('…');
    }
    escaped
}

/// A body, of which at most so many bytes are shown: line breaks and tabs stay.
pub(crate) fn block(bytes: &[u8], limit: usize) -> String {
    let cut = &bytes[..bytes.len().min(limit)];
    let mut text = escape(String::from_utf8_lossy(cut).chars(), &['\n', '\t']);
    if cut.len() < bytes.len() {
        text.push_str(&format!("… (the first {limit} of {} bytes)", bytes.len()));
    }
    text
}

fn escape(chars: impl Iterator<Item = char>, kept: &[char]) -> String {
    let mut escaped = String::new();
    for c in chars {
        if kept.contains(&c) || !(c.is_control() || turns_text(c)) {
            escaped.push(c);
        } else {
            escaped.extend(c.escape_unicode());
        }
    }
    escaped
}

/// Whether what follows may be shown in another order than it is written (Unicode UAX #9).
fn turns_text(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_that_it_would_act_on() {
        assert_eq!(block(b"a\x1b[2Jb\n\tc\xff\x07", 100), "a\\u{1b}[2Jb\n\tc\u{fffd}\\u{7}");
        assert_eq!(block(b"abcdef", 3), "abc… (the first 3 of 6 bytes)");
        assert_eq!(line("\u{9b}31m\r\n\u{202e}x"), "\\u{9b}31m\\u{d}\\u{a}\\u{202e}x");
        assert_eq!(line(&"x".repeat(2000)).chars().count(), LINE_CHARS + 1);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_made_harmless(bytes: Vec<u8>, limit in 0usize..64) {
            prop_assert!(block(&bytes, limit).chars().all(|c| !c.is_control() || c == '\n' || c == '\t'));
            prop_assert!(!line(&String::from_utf8_lossy(&bytes)).chars().any(char::is_control));
        }
    }
}
