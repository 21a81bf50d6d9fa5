//! Escapes text from requests and endpoints, so that it cannot send control sequences to the terminal.

const MAX_LINE_CHARS: usize = 1024;

/// Text on one line: control characters are escaped, and text over [`MAX_LINE_CHARS`] is cut.
pub(crate) fn escaped(text: &str) -> String {
    let mut escaped: String = escape(text.chars().take(MAX_LINE_CHARS), &[]);
    if text.chars().nth(MAX_LINE_CHARS).is_some() {
        escaped.push('…');
    }
    escaped
}

/// A body on several lines, cut to `limit` bytes: line breaks and tabs are kept.
pub(crate) fn escaped_block(bytes: &[u8], limit: usize) -> String {
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
        if kept.contains(&c) || !(c.is_control() || is_bidi_control(c)) {
            escaped.push(c);
        } else {
            escaped.extend(c.escape_unicode());
        }
    }
    escaped
}

/// Whether the character can change the order in which text is shown (Unicode UAX #9).
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_are_escaped_and_long_text_is_cut() {
        assert_eq!(escaped_block(b"a\x1b[2Jb\n\tc\xff\x07", 100), "a\\u{1b}[2Jb\n\tc\u{fffd}\\u{7}");
        assert_eq!(escaped_block(b"abcdef", 3), "abc… (the first 3 of 6 bytes)");
        assert_eq!(escaped("\u{9b}31m\r\n\u{202e}x"), "\\u{9b}31m\\u{d}\\u{a}\\u{202e}x");
        assert_eq!(escaped(&"x".repeat(2000)).chars().count(), MAX_LINE_CHARS + 1);
    }

    proptest! {
        #[test]
        fn no_control_character_is_left(bytes: Vec<u8>, limit in 0usize..64) {
            prop_assert!(escaped_block(&bytes, limit).chars().all(|c| !c.is_control() || c == '\n' || c == '\t'));
            prop_assert!(!escaped(&String::from_utf8_lossy(&bytes)).chars().any(char::is_control));
        }
    }
}
