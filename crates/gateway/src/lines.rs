//! 1 Accept: a body of many JSON texts, cut into them as it arrives: a text per line (NDJSON), or one array of them.
//!
//! Only the frame is read here, and no more than one text is held. Whether a text is JSON is for whoever reads it; what
//! is cut wrongly because it is none is none after the cut either.

use bytes::{Buf, Bytes};

/// A piece of the body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A text, without the space around it.
    Text(Vec<u8>),
    /// A text that was longer than may be; it is gone.
    TooLong,
    /// What comes from here on cannot be cut.
    Broken(&'static str),
}

/// Cuts a body.
#[derive(Debug)]
pub(crate) struct Cutter {
    max_bytes: usize,
    /// What came and was not looked at yet.
    input: Bytes,
    /// What came of the text that is not whole yet.
    text: Vec<u8>,
    too_long: bool,
    form: Form,
}

#[derive(Debug, Clone, Copy)]
enum Form {
    /// Nothing but space came yet.
    Unknown,
    Lines,
    /// Inside the array's brackets; whether there was a comma already, and where in the present text.
    Array {
        first: bool,
        place: Place,
    },
    /// The array ended, or the body cannot be cut any further.
    Over {
        broken: bool,
    },
}

/// Where in a JSON text.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Place {
    /// Goes on by a byte; whether it is a comma or closing bracket of the array around the text.
    fn step(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b',' | b']' if self.depth == 0 => return true,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        false
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

impl Cutter {
    /// For texts of at most so many bytes.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, input: Bytes::new(), text: Vec::new(), too_long: false, form: Form::Unknown }
    }

    /// Takes what arrived, once [`next`](Self::next) has nothing more.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        debug_assert!(self.input.is_empty(), "what came before was not taken");
        self.input = bytes;
    }

    /// The next piece; none until more arrives.
    pub(crate) fn next(&mut self) -> Option<Piece> {
        while self.input.has_remaining() {
            match &mut self.form {
                Form::Unknown => {
                    let Some(start) = self.input.iter().position(|byte| !is_space(*byte)) else {
                        self.input.clear();
                        return None;
                    };
                    self.input.advance(start);
                    if self.input[0] == b'[' {
                        self.input.advance(1);
                        self.form = Form::Array { first: true, place: Place::default() };
                    } else {
                        self.form = Form::Lines;
                    }
                }
                Form::Lines => {
                    let end = self.input.iter().position(|byte| *byte == b'\n');
                    self.keep(end.unwrap_or(self.input.len()));
                    if end.is_some() {
                        self.input.advance(1);
                        if let Some(text) = self.take_text() {
                            return Some(text);
                        }
                    }
                }
                Form::Array { first, place } => {
                    let Some(end) = self.input.iter().position(|byte| place.step(*byte)) else {
                        self.keep(self.input.len());
                        return None;
                    };
                    *place = Place::default();
                    let first = std::mem::replace(first, false);
                    let closes = self.input[end] == b']';
                    self.keep(end);
                    self.input.advance(1);
                    if closes {
                        self.form = Form::Over { broken: false };
                    }
                    let text = self.take_text();
                    // Nothing between brackets is no text; nothing beside a comma is one that is missing.
                    if text.is_some() || !(first && closes) {
                        return text.or(Some(Piece::Text(Vec::new())));
                    }
                }
                Form::Over { broken } => {
                    let rest = self.input.split_to(self.input.len());
                    if !*broken && !rest.iter().copied().all(is_space) {
                        *broken = true;
                        return Some(Piece::Broken("something stands behind the array"));
                    }
                }
            }
        }
        None
    }

    /// The last piece, once nothing more will arrive.
    pub(crate) fn finish(&mut self) -> Option<Piece> {
        match self.form {
            Form::Lines => self.take_text(),
            Form::Array { .. } => {
                self.form = Form::Over { broken: true };
                Some(Piece::Broken("the array does not end"))
            }
            Form::Unknown | Form::Over { .. } => None,
        }
    }

    /// Moves so many bytes of the input to the text.
    fn keep(&mut self, mut bytes: usize) {
        if self.text.is_empty() {
            let space = self.input[..bytes].iter().take_while(|byte| is_space(**byte)).count();
            self.input.advance(space);
            bytes -= space;
        }
        self.too_long |= self.text.len() + bytes > self.max_bytes;
        if self.too_long {
            self.text.clear();
            self.input.advance(bytes);
        } else {
            self.text.extend_from_slice(&self.input.split_to(bytes));
        }
    }

    /// The text that is whole now, if it is more than space.
    fn take_text(&mut self) -> Option<Piece> {
        let mut text = std::mem::take(&mut self.text);
        if std::mem::take(&mut self.too_long) {
            return Some(Piece::TooLong);
        }
        let end = text.iter().rposition(|byte| !is_space(*byte))?;
        text.truncate(end + 1);
        Some(Piece::Text(text))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// The pieces of a body that arrives in parts of this size; what is broken by what is said of it.
    fn pieces(body: &[u8], part: usize) -> Vec<String> {
        let mut cutter = Cutter::new(12);
        let mut pieces = Vec::new();
        for part in body.chunks(part) {
            cutter.push(Bytes::copy_from_slice(part));
            while let Some(piece) = cutter.next() {
                pieces.push(piece);
            }
        }
        pieces.extend(cutter.finish());
        let told = |piece| match piece {
            Piece::Text(text) => String::from_utf8_lossy(&text).into_owned(),
            Piece::TooLong => "too long".to_owned(),
            Piece::Broken(why) => format!("broken: {why}"),
        };
        pieces.into_iter().map(told).collect()
    }

    #[test]
    fn lines_and_arrays_are_cut_wherever_they_break() {
        let not_ended = "broken: the array does not end";
        for (body, expected) in [
            ("", &[][..]),
            (" \n\r\n ", &[]),
            ("{\"a\":1}\n{\"b\":2}", &["{\"a\":1}", "{\"b\":2}"]),
            ("\n\n {\"a\":1} \r\n\r\n{\"b\":2}\r\n", &["{\"a\":1}", "{\"b\":2}"]),
            ("{\"a\":[1,2]}\n7\nnull", &["{\"a\":[1,2]}", "7", "null"]),
            ("{\"a\":1234567890}\n{}", &["too long", "{}"]),
            ("[]", &[]),
            (" [ ] \n", &[]),
            ("[{\"a\":1},{\"b\":2}]", &["{\"a\":1}", "{\"b\":2}"]),
            ("[\n {\"a\":[1,2]} ,\n {} \n]\n", &["{\"a\":[1,2]}", "{}"]),
            ("[\"],{\\\"\",2]", &["\"],{\\\"\"", "2"]),
            ("[\"\\\\\",[[],{}]]", &["\"\\\\\"", "[[],{}]"]),
            ("[{\"a\":1234567890},{}]", &["too long", "{}"]),
            ("[1,,2,]", &["1", "", "2", ""]),
            ("[,]", &["", ""]),
            ("[1}]", &["1}"]),
            ("[1] 2", &["1", "broken: something stands behind the array"]),
            ("[1]][2]", &["1", "broken: something stands behind the array"]),
            ("[", &[not_ended]),
            ("[1,{\"a\":2}", &["1", not_ended]),
            ("[\"1,2]", &[not_ended]),
        ] {
            for part in [1, 2, 3, 5, 100] {
                assert_eq!(pieces(body.as_bytes(), part), expected, "{body:?} in parts of {part}");
            }
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i32>().prop_map(Value::from),
            r#"[\[\]{}",:\\ \n\u{e4}a]{0,6}"#.prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"\\\\]", inner, 0..4).prop_map(Value::from_iter),
            ]
        })
    }

    proptest! {
        /// Whatever a serializer writes is cut into what it was made of.
        #[test]
        fn what_was_written_is_what_is_read(
            values in prop::collection::vec(any_json(), 0..6), lines: bool, pretty: bool, part in 1_usize..40,
        ) {
            // In lines, an array would be taken for the one around it all.
            prop_assume!(!lines || !values.first().is_some_and(Value::is_array));
            let body = match (lines, pretty) {
                (true, _) => values.iter().map(|value| format!("{value}\n")).collect(),
                (false, true) => serde_json::to_string_pretty(&values).unwrap(),
                (false, false) => serde_json::to_string(&values).unwrap(),
            };
            let mut cutter = Cutter::new(usize::MAX);
            let mut read = Vec::new();
            for part in body.as_bytes().chunks(part) {
                cutter.push(Bytes::copy_from_slice(part));
                while let Some(piece) = cutter.next() {
                    let Piece::Text(text) = piece else { panic!("{piece:?}") };
                    read.push(serde_json::from_slice::<Value>(&text).unwrap());
                }
            }
            prop_assert_eq!(cutter.finish(), None);
            prop_assert_eq!(read, values);
        }

        #[test]
        fn any_bytes_are_cut_and_held_within_bounds(
            body in prop_oneof![any::<Vec<u8>>(), prop::collection::vec(prop::sample::select(b"[]{}\",\\ \n1".to_vec()), 0..60)],
            part in 1_usize..20,
        ) {
            let mut cutter = Cutter::new(8);
            for part in body.chunks(part) {
                cutter.push(Bytes::copy_from_slice(part));
                while let Some(piece) = cutter.next() {
                    prop_assert!(!matches!(piece, Piece::Text(text) if text.len() > 8));
                }
                prop_assert!(cutter.text.len() <= 8);
            }
            cutter.finish();
        }
    }
}
