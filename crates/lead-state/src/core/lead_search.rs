//! The possible meanings of a text that leads are searched for.

use contract::{ObjectId, text};

/// The shortest part of a name to search for. A shorter one matches too many names.
const MIN_NAME_CHARS: usize = 2;
/// The fewest digits of a phone number to search for. Fewer match too many numbers.
const MIN_PHONE_DIGITS: usize = 6;
/// Only this many characters of a name, and digits of a phone number, are indexed.
const MAX_NAME_CHARS: usize = 64;
const MAX_PHONE_DIGITS: usize = 32;

/// The conditions of a search, which finds the leads that match any of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeadSearch {
    pub(crate) lead_id: Option<ObjectId>,
    pub(crate) reference_id: String,
    /// The lead's e-mail address; case is ignored.
    pub(crate) email: Option<String>,
    /// The last digits of the lead's phone number, in reverse order.
    pub(crate) phone_end: Option<String>,
    /// The beginning of the lead's name; case is ignored.
    pub(crate) name_start: Option<String>,
}

impl LeadSearch {
    /// None if the text is empty.
    pub(crate) fn parse(search: &str) -> Option<Self> {
        let search = text::trim(search);
        if search.is_empty() {
            return None;
        }
        let lead_id = search.parse().ok();
        let is_email = search.contains('@');
        Some(Self {
            lead_id,
            reference_id: search.to_owned(),
            email: is_email.then(|| search.to_owned()),
            phone_end: phone_end(search).filter(|_| lead_id.is_none()),
            name_start: name_start(search).filter(|_| lead_id.is_none() && !is_email),
        })
    }
}

fn phone_end(search: &str) -> Option<String> {
    let is_separator = |char: char| char.is_whitespace() || "+-./()".contains(char);
    if !search.chars().all(|char| char.is_ascii_digit() || is_separator(char)) {
        return None;
    }
    let digits: String = search.chars().rev().filter(char::is_ascii_digit).take(MAX_PHONE_DIGITS).collect();
    (digits.len() >= MIN_PHONE_DIGITS).then_some(digits)
}

fn name_start(search: &str) -> Option<String> {
    let start: String = search.chars().take(MAX_NAME_CHARS).collect();
    (start.chars().count() >= MIN_NAME_CHARS).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The meanings of a text as an e-mail address, the end of a phone number, and the beginning of a name.
    fn meanings(text: &str) -> [Option<String>; 3] {
        let LeadSearch { lead_id, reference_id, email, phone_end, name_start } = LeadSearch::parse(text).unwrap();
        assert_eq!((lead_id, reference_id.as_str()), (text.parse().ok(), text));
        [email, phone_end, name_start]
    }

    #[test]
    fn a_text_is_searched_in_the_fields_that_it_can_match() {
        let some = |text: &str| Some(text.to_owned());
        let cases = [
            ("Ada Lovelace", [None, None, some("Ada Lovelace")]),
            ("Ad", [None, None, some("Ad")]),
            ("A", [None, None, None]),
            ("ada@example.com", [some("ada@example.com"), None, None]),
            ("+1 (415) 555-0101", [None, some("10105555141"), some("+1 (415) 555-0101")]),
            ("550101", [None, some("101055"), some("550101")]),
            ("55010", [None, None, some("55010")]),
            ("R-5550101", [None, None, some("R-5550101")]),
            ("696102a4b8c1d2e3f4a5b6c7", [None, None, None]),
        ];
        for (text, expected) in cases {
            assert_eq!(meanings(text), expected, "{text}");
        }
    }

    #[test]
    fn texts_are_trimmed_and_cut_at_what_is_indexed() {
        assert_eq!(LeadSearch::parse(" \u{a0}"), None);
        assert_eq!(LeadSearch::parse(" Ada\u{200b} ").unwrap().name_start.as_deref(), Some("Ada"));
        let long = "é".repeat(MAX_NAME_CHARS + 1);
        assert_eq!(LeadSearch::parse(&long).unwrap().name_start, Some("é".repeat(MAX_NAME_CHARS)));
        let digits = LeadSearch::parse(&format!("1{}", "2".repeat(MAX_PHONE_DIGITS))).unwrap().phone_end;
        assert_eq!(digits, Some("2".repeat(MAX_PHONE_DIGITS)));
    }
}
