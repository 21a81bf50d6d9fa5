//! Text files as programs write them: UTF-8 or UTF-16, with or without byte order marks.

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
    /// Detects the encoding by a byte order mark. Without one, a zero byte beside an ASCII character means UTF-16.
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

    proptest! {
        #[test]
        fn arbitrary_utf_16_is_decoded(text in "[^\0]{1,40}", big_endian: bool) {
            let bytes = utf16(&format!("\u{feff}{text}"), big_endian);
            prop_assert_eq!(read(&bytes).unwrap(), text.trim_start_matches('\u{feff}'));
        }
    }
}
