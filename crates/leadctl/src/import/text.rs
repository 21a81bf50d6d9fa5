//! Text files as programs write them: UTF-8 or UTF-16, with or without byte order marks, and invisible characters.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Bytes of UTF-16 that are decoded at once.
const CHUNK_BYTES: usize = 8 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Utf8,
    Utf16 { big_endian: bool },
}

impl Encoding {
    /// By a byte order mark. Without one, text whose first character is ASCII shows a zero byte in UTF-16.
    fn detect(start: &[u8]) -> Self {
        match start {
            [0xff, 0xfe, ..] => Self::Utf16 { big_endian: false },
            [0xfe, 0xff, ..] => Self::Utf16 { big_endian: true },
            [first, 0, ..] if *first != 0 => Self::Utf16 { big_endian: false },
            [0, second, ..] if *second != 0 => Self::Utf16 { big_endian: true },
            _ => Self::Utf8,
        }
    }
}

/// Reads a file as UTF-8, without byte order marks at its start. UTF-8 itself is not checked.
pub(crate) fn open<R: Read + 'static>(file: R) -> io::Result<(Box<dyn BufRead>, Encoding)> {
    let mut file = BufReader::new(file);
    let encoding = Encoding::detect(file.fill_buf()?);
    let mut text: Box<dyn BufRead> = match encoding {
        Encoding::Utf8 => Box::new(file),
        Encoding::Utf16 { big_endian } => {
            Box::new(BufReader::new(Utf16 { inner: file, big_endian, half: None, decoded: io::Cursor::default() }))
        }
    };
    while text.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
        text.consume(BYTE_ORDER_MARK.len());
    }
    Ok((text, encoding))
}

/// Decodes UTF-16.
struct Utf16<R> {
    inner: R,
    big_endian: bool,
    /// The first half of a surrogate pair, whose second half was not read yet.
    half: Option<u16>,
    decoded: io::Cursor<String>,
}

impl<R: Read> Utf16<R> {
    fn decode_chunk(&mut self) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(CHUNK_BYTES);
        let read = self.inner.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut bytes)?;
        let invalid =
            |why: &str| io::Error::new(ErrorKind::InvalidData, format!("the file is not valid UTF-16: {why}"));
        let (pairs, rest) = bytes.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(invalid("it has an odd number of bytes"));
        }
        let unit = |pair: &[u8; 2]| if self.big_endian { u16::from_be_bytes(*pair) } else { u16::from_le_bytes(*pair) };
        let mut units: Vec<u16> = self.half.take().into_iter().chain(pairs.iter().map(unit)).collect();
        if read > 0 {
            self.half = units.pop_if(|unit| (0xd800..0xdc00).contains(unit));
        }
        let text = String::from_utf16(&units).map_err(|_| invalid("it contains half a surrogate pair"))?;
        self.decoded = io::Cursor::new(text);
        Ok(())
    }
}

impl<R: Read> Read for Utf16<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.decoded.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            self.decode_chunk()?;
            if self.decoded.get_ref().is_empty() && self.half.is_none() {
                return Ok(0);
            }
        }
    }
}

/// Characters without a shape of their own, with their Unicode names. Spreadsheets and web pages leave them in copied text.
const INVISIBLE: [(char, &str); 19] = [
    ('\u{ad}', "SOFT HYPHEN"),
    ('\u{61c}', "ARABIC LETTER MARK"),
    ('\u{180e}', "MONGOLIAN VOWEL SEPARATOR"),
    ('\u{200b}', "ZERO WIDTH SPACE"),
    ('\u{200c}', "ZERO WIDTH NON-JOINER"),
    ('\u{200d}', "ZERO WIDTH JOINER"),
    ('\u{200e}', "LEFT-TO-RIGHT MARK"),
    ('\u{200f}', "RIGHT-TO-LEFT MARK"),
    ('\u{202a}', "LEFT-TO-RIGHT EMBEDDING"),
    ('\u{202b}', "RIGHT-TO-LEFT EMBEDDING"),
    ('\u{202c}', "POP DIRECTIONAL FORMATTING"),
    ('\u{202d}', "LEFT-TO-RIGHT OVERRIDE"),
    ('\u{202e}', "RIGHT-TO-LEFT OVERRIDE"),
    ('\u{2060}', "WORD JOINER"),
    ('\u{2066}', "LEFT-TO-RIGHT ISOLATE"),
    ('\u{2067}', "RIGHT-TO-LEFT ISOLATE"),
    ('\u{2068}', "FIRST STRONG ISOLATE"),
    ('\u{2069}', "POP DIRECTIONAL ISOLATE"),
    ('\u{feff}', "ZERO WIDTH NO-BREAK SPACE (byte order mark)"),
];

/// The first invisible character of a text, e.g. `U+200B ZERO WIDTH SPACE`.
pub(crate) fn invisible(text: &str) -> Option<String> {
    let name = |c: char| match INVISIBLE.iter().find(|(invisible, _)| *invisible == c) {
        Some((_, name)) => Some(*name),
        None if c == '\u{a0}' => Some("NO-BREAK SPACE"),
        None if c.is_control() => Some("control character"),
        None => None,
    };
    text.chars().find_map(|c| Some(format!("U+{:04X} {}", u32::from(c), name(c)?)))
}

/// Removes white space and invisible characters around a text that cannot mean them.
pub(crate) fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || INVISIBLE.iter().any(|(invisible, _)| *invisible == c))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn utf16(text: &str, big_endian: bool) -> Vec<u8> {
        let bytes = text.encode_utf16().map(|unit| if big_endian { unit.to_be_bytes() } else { unit.to_le_bytes() });
        bytes.flatten().collect()
    }

    fn read(bytes: &[u8]) -> io::Result<String> {
        let mut text = String::new();
        open(io::Cursor::new(bytes.to_vec()))?.0.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn utf_16_is_decoded_and_byte_order_marks_are_removed() {
        for marks in ["", "\u{feff}", "\u{feff}\u{feff}"] {
            let text = format!("{marks}leadId,näme 🙂\n{}", "é🙂".repeat(CHUNK_BYTES));
            let plain = text.trim_start_matches('\u{feff}');
            assert_eq!(read(text.as_bytes()).unwrap(), plain);
            assert_eq!(read(&utf16(&text, false)).unwrap(), plain);
            assert_eq!(read(&utf16(&text, true)).unwrap(), plain);
        }
        for (bytes, fault) in [(&b"\xff\xfea"[..], "odd number"), (b"\xff\xfea\0\x3d\xd8", "half a surrogate pair")] {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
    }

    #[test]
    fn invisible_characters_are_named_and_trimmed() {
        assert_eq!(invisible("na\u{200b}me").as_deref(), Some("U+200B ZERO WIDTH SPACE"));
        assert_eq!(invisible("a\u{a0}b").as_deref(), Some("U+00A0 NO-BREAK SPACE"));
        assert_eq!(invisible("a\u{7}b").as_deref(), Some("U+0007 control character"));
        assert_eq!(invisible("näme 🙂"), None);
        assert_eq!(trim("\u{feff} \u{202a}R 1\u{202c}\u{a0}"), "R 1");
    }

    proptest! {
        #[test]
        fn arbitrary_utf_16_is_decoded(text in "[^\0]{1,40}", big_endian: bool) {
            let bytes = utf16(&format!("\u{feff}{text}"), big_endian);
            prop_assert_eq!(read(&bytes).unwrap(), text.trim_start_matches('\u{feff}'));
        }
    }
}
