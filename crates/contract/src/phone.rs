//! Phone numbers, as clients write them.

use crate::text::{is_zero_width, name_char, trim};

/// The fewest identical digits behind a country code that are refused. A shorter number may consist of one digit.
const MIN_REPEATED: usize = 6;
/// The same for numbers without a plus sign: with fewer digits, they may be national ones, which have at most ten.
const MIN_NATIONAL: usize = 10;

/// Why a text is not a phone number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PhoneFault {
    /// It contains a character that phone numbers do not have.
    #[error("must be a phone number, best in E.164 form such as +14155550123, and contains {0}")]
    Character(String),
    /// It has too few or too many digits.
    #[error("must be a phone number, best in E.164 form such as +14155550123")]
    Form,
    /// It repeats one digit. The error text is the vendor's.
    #[error("Phone number contains repeating digits pattern")]
    Repeating,
}

/// Checks a phone number and returns the text to store: as written, but with plain spaces and hyphens, and without the
/// zero-width characters and direction marks that come with copied numbers.
///
/// # Errors
/// The text is not a phone number.
pub fn parse(text: &str) -> Result<String, PhoneFault> {
    let plain = |c: char| match c {
        '\u{2010}'..='\u{2015}' | '\u{2212}' => '-',
        c if c.is_whitespace() && !c.is_control() => ' ',
        c => c,
    };
    let phone: String = trim(text).chars().filter(|c| !is_zero_width(*c)).map(plain).collect();
    let is_allowed = |(i, c): &(usize, char)| c.is_ascii_digit() || " -.()/".contains(*c) || (*c == '+' && *i == 0);
    if let Some((_, c)) = phone.chars().enumerate().find(|at| !is_allowed(at)) {
        return Err(PhoneFault::Character(name_char(c)));
    }
    let digits: String = phone.chars().filter(char::is_ascii_digit).collect();
    // E.164 has at most 15 digits, and no country's numbers have fewer than 5.
    if !(5..=15).contains(&digits.len()) {
        return Err(PhoneFault::Form);
    }
    if is_repeating(&digits, phone.starts_with('+')) {
        return Err(PhoneFault::Repeating);
    }
    Ok(phone)
}

/// Whether the number repeats one digit: as a whole, behind its country code, or behind the trunk prefix 0.
fn is_repeating(digits: &str, has_plus: bool) -> bool {
    let same = |digits: &str| digits.bytes().all(|digit| Some(&digit) == digits.as_bytes().first());
    let national = |digits: &str, min: usize| {
        let without_trunk = digits.strip_prefix('0').unwrap_or(digits);
        [digits, without_trunk].iter().any(|digits| digits.len() >= min && same(digits))
    };
    let international = digits.strip_prefix("00").filter(|_| !has_plus).unwrap_or(digits);
    let min = if has_plus || international.len() < digits.len() { MIN_REPEATED } else { MIN_NATIONAL };
    same(digits)
        || national(digits, MIN_REPEATED)
        || country_code(international).is_some_and(|code| national(&international[code..], min))
}

/// The length of the country code that an international number begins with (ITU-T E.164): of one digit for zones 1
/// and 7, otherwise of two or three.
fn country_code(digits: &str) -> Option<usize> {
    const TWO_DIGITS: [&str; 42] = [
        "20", "27", "30", "31", "32", "33", "34", "36", "39", "40", "41", "43", "44", "45", "46", "47", "48", "49",
        "51", "52", "53", "54", "55", "56", "57", "58", "60", "61", "62", "63", "64", "65", "66", "81", "82", "84",
        "86", "90", "91", "92", "93", "94",
    ];
    const LATER: [&str; 2] = ["95", "98"];
    let zone = digits.get(..2)?;
    Some(match zone.as_bytes()[0] {
        b'0' => return None,
        b'1' | b'7' => 1,
        _ if TWO_DIGITS.contains(&zone) || LATER.contains(&zone) => 2,
        _ => 3,
    })
    .filter(|length| *length < digits.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_stored_as_written_without_invisible_characters() {
        for (text, stored) in [
            ("+14155550123", "+14155550123"),
            ("(0)30 / 1234-567", "(0)30 / 1234-567"),
            ("030.1234", "030.1234"),
            (" 12345 ", "12345"),
            ("+1 (415)\u{a0}555-0123", "+1 (415) 555-0123"),
            ("\u{202a}+1 (415) 555-0123\u{202c}", "+1 (415) 555-0123"),
            ("\u{feff}+1\u{2009}415\u{200b}555\u{2011}0123\u{200e}", "+1 415555-0123"),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(stored), "{text:?}");
        }
    }

    #[test]
    fn a_text_that_is_not_a_number_is_refused_with_the_reason() {
        for (text, fault) in [
            ("1234", PhoneFault::Form),
            ("1234567890123456", PhoneFault::Form),
            ("\u{200b}", PhoneFault::Form),
            ("call me", PhoneFault::Character("U+0063 'c'".into())),
            ("1+23456", PhoneFault::Character("U+002B '+'".into())),
            ("+14155550123x9", PhoneFault::Character("U+0078 'x'".into())),
            ("+1415\t5550123", PhoneFault::Character("U+0009".into())),
            ("٠١٢٣٤٥", PhoneFault::Character("U+0660 '٠'".into())),
        ] {
            assert_eq!(parse(text), Err(fault), "{text:?}");
        }
    }

    #[test]
    fn a_repeated_digit_is_refused_with_and_without_a_country_code() {
        for text in [
            "0000000000",
            "+1 111 111 111",
            "+91 1111111111",
            "+911111111111",
            "911111111111",
            "0091 1111111111",
            "+91 (0) 1111111111",
            "01111111111",
            "+1 (222) 222-2222",
            "12222222222",
            "+353 2222222",
            "\u{202a}+91\u{a0}1111111111\u{202c}",
        ] {
            assert_eq!(parse(text), Err(PhoneFault::Repeating), "{text:?}");
        }
        for text in
            ["+14155550123", "7222222222", "+91 98765 43210", "01777777777", "+49 11111", "+44 7777 777778", "110110"]
        {
            assert!(parse(text).is_ok(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_texts_never_panic_and_parsing_twice_changes_nothing(text in ".*|[+0-9 ()\u{a0}-]{0,20}") {
            if let Ok(phone) = parse(&text) {
                proptest::prop_assert_eq!(parse(&phone), Ok(phone.clone()));
            }
        }
    }
}
