//! Text from requests and endpoints, cut to a length that people read.

use service_kit::escape::{escaped_line, escaped_text};

const MAX_LINE_CHARS: usize = 1024;

/// Text on one line: control characters are escaped, and text over [`MAX_LINE_CHARS`] is cut.
pub(crate) fn escaped(text: &str) -> String {
    match text.char_indices().nth(MAX_LINE_CHARS) {
        Some((end, _)) => format!("{}…", escaped_line(&text[..end])),
        None => escaped_line(text),
    }
}

/// A body on several lines, cut to `limit` bytes: line breaks and tabs are kept.
pub(crate) fn escaped_block(bytes: &[u8], limit: usize) -> String {
    let cut = &bytes[..bytes.len().min(limit)];
    let mut text = escaped_text(&String::from_utf8_lossy(cut));
    if cut.len() < bytes.len() {
        text.push_str(&format!("… (the first {limit} of {} bytes)", bytes.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut() {
        assert_eq!(escaped_block(b"a\x1b[2Jb\n\tc\xff\x07", 100), "a\\u{1b}[2Jb\n\tc\u{fffd}\\u{7}");
        assert_eq!(escaped_block(b"abcdef", 3), "abc… (the first 3 of 6 bytes)");
        assert_eq!(escaped("a\r\nb"), "a\\u{d}\\u{a}b");
        assert_eq!(escaped(&"é".repeat(2000)).chars().count(), MAX_LINE_CHARS + 1);
    }
}
