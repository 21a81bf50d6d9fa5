//! Escapes text from requests, files and endpoints for terminals and logs: control characters would move the cursor,
//! change colors or forge lines.

/// Text on one line: control characters and line breaks are escaped.
pub fn escaped_line(text: &str) -> String {
    escape(text, &[])
}

/// Text on several lines: line breaks and tabs are kept.
pub fn escaped_text(text: &str) -> String {
    escape(text, &['\n', '\t'])
}

/// Equivalent JSON text. serde_json escapes only the control characters of ASCII.
pub fn escaped_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        if is_dangerous(c) && !c.is_ascii_whitespace() {
            escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

fn escape(text: &str, kept: &[char]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_dangerous(c) && !kept.contains(&c) {
            escaped.extend(c.escape_unicode());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// A control character, or one that changes the order in which text is shown (Unicode UAX #9).
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        let text = "a\x1b[2J\u{9b}31m\r\n\t\u{202e}\u{2028}\x7fé";
        assert_eq!(escaped_line(text), "a\\u{1b}[2J\\u{9b}31m\\u{d}\\u{a}\\u{9}\\u{202e}\\u{2028}\\u{7f}é");
        assert_eq!(escaped_text(text), "a\\u{1b}[2J\\u{9b}31m\\u{d}\n\t\\u{202e}\\u{2028}\\u{7f}é");
        assert_eq!(escaped_line(&escaped_line(text)), escaped_line(text));
        let json = serde_json::json!({"a": text}).to_string();
        let escaped = escaped_json(&json);
        assert!(!escaped.chars().any(is_dangerous), "{escaped}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap()["a"], text);
    }
}
