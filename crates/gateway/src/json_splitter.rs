//! 1 Accept: splits a body of many JSON texts as it arrives: a text per line (NDJSON), or one array of them.
//!
//! The splitter only finds the boundaries of items, and holds at most one item; the caller validates items. In NDJSON a
//! line break always ends an item, so a text with line breaks becomes several items.

use bytes::{Buf, Bytes};
use contract::json::BYTE_ORDER_MARK;

/// An item of the body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A text, without the white space around it.
    Text(Bytes),
    /// A text beyond the limit, dropped.
    TooLong,
    /// The rest of the body cannot be split.
    Broken(&'static str),
}

#[derive(Debug)]
pub(crate) struct JsonSplitter {
    max_bytes: usize,
    /// Arrived and not scanned yet.
    input: Bytes,
    /// The beginning of an item that is not complete yet.
    text: Text,
    too_long: bool,
    form: Form,
}

#[derive(Debug, Clone, Copy)]
enum Form {
    /// Only white space and byte order marks so far, and this many bytes of a mark that is not complete yet.
    Unknown {
        mark: usize,
    },
    Lines,
    /// Inside the brackets of the array.
    Array {
        /// Whether the item is the first one.
        first: bool,
        scan: ScanState,
    },
    /// The array ended, or the body cannot be split any further.
    Over {
        broken: bool,
    },
}

/// The position in the structure of a JSON text.
#[derive(Debug, Clone, Copy, Default)]
struct ScanState {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl ScanState {
    /// Scans a byte; returns whether it is a comma or closing bracket of the enclosing array.
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

/// The bytes of an item. An item that arrives in one part, as most do, is not copied.
#[derive(Debug, Default)]
struct Text {
    whole: Bytes,
    /// The parts so far, once there are several.
    joined: Vec<u8>,
}

impl Text {
    fn len(&self) -> usize {
        self.whole.len() + self.joined.len()
    }

    fn push(&mut self, part: Bytes) {
        if self.len() == 0 {
            self.whole = part;
            return;
        }
        self.joined.extend_from_slice(&std::mem::take(&mut self.whole));
        self.joined.extend_from_slice(&part);
    }

    fn take(&mut self) -> Bytes {
        let Self { whole, joined } = std::mem::take(self);
        if joined.is_empty() { whole } else { joined.into() }
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

impl JsonSplitter {
    /// An item longer than `max_bytes` becomes [`Item::TooLong`].
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, input: Bytes::new(), text: Text::default(), too_long: false, form: Form::Unknown { mark: 0 } }
    }

    /// Adds input. [`next`](Self::next) must have returned None before.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        debug_assert!(self.input.is_empty(), "the previous input was not consumed");
        self.input = bytes;
    }

    /// The next complete item.
    pub(crate) fn next(&mut self) -> Option<Item> {
        while self.input.has_remaining() {
            match &mut self.form {
                Form::Unknown { mark } => match self.input[0] {
                    byte if byte == BYTE_ORDER_MARK[*mark] => {
                        *mark = (*mark + 1) % BYTE_ORDER_MARK.len();
                        self.input.advance(1);
                    }
                    // An incomplete mark belongs to the first item, and makes it invalid.
                    _ if *mark > 0 => {
                        self.text.push(Bytes::from_static(&BYTE_ORDER_MARK[..*mark]));
                        self.form = Form::Lines;
                    }
                    byte if is_space(byte) => self.input.advance(1),
                    b'[' => {
                        self.input.advance(1);
                        self.form = Form::Array { first: true, scan: ScanState::default() };
                    }
                    _ => self.form = Form::Lines,
                },
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
                Form::Array { first, scan } => {
                    let Some(end) = self.input.iter().position(|byte| scan.step(*byte)) else {
                        self.keep(self.input.len());
                        return None;
                    };
                    *scan = ScanState::default();
                    let first = std::mem::replace(first, false);
                    let closes = self.input[end] == b']';
                    self.keep(end);
                    self.input.advance(1);
                    if closes {
                        self.form = Form::Over { broken: false };
                    }
                    let text = self.take_text();
                    // `[]` has no item; `[,]` has two empty ones.
                    if text.is_some() || !(first && closes) {
                        return text.or(Some(Item::Text(Bytes::new())));
                    }
                }
                Form::Over { broken } => {
                    let rest = self.input.split_to(self.input.len());
                    if !*broken && !rest.iter().copied().all(is_space) {
                        *broken = true;
                        return Some(Item::Broken("text after the end of the array"));
                    }
                }
            }
        }
        None
    }

    /// The last item, once the body has ended.
    pub(crate) fn finish(&mut self) -> Option<Item> {
        match self.form {
            Form::Lines => self.take_text(),
            Form::Array { .. } => {
                self.form = Form::Over { broken: true };
                Some(Item::Broken("the array is not closed"))
            }
            Form::Unknown { mark } if mark > 0 => Some(Item::Text(Bytes::from_static(&BYTE_ORDER_MARK[..mark]))),
            Form::Unknown { .. } | Form::Over { .. } => None,
        }
    }

    /// Moves bytes of the input to the item.
    fn keep(&mut self, mut bytes: usize) {
        if self.text.len() == 0 {
            let space = self.input[..bytes].iter().take_while(|byte| is_space(**byte)).count();
            self.input.advance(space);
            bytes -= space;
        }
        self.too_long |= self.text.len() + bytes > self.max_bytes;
        if self.too_long {
            self.text.take();
            self.input.advance(bytes);
        } else {
            self.text.push(self.input.split_to(bytes));
        }
    }

    /// The complete item, unless it is only white space.
    fn take_text(&mut self) -> Option<Item> {
        let mut text = self.text.take();
        if std::mem::take(&mut self.too_long) {
            return Some(Item::TooLong);
        }
        let end = text.iter().rposition(|byte| !is_space(*byte))?;
        text.truncate(end + 1);
        Some(Item::Text(text))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// The items of a body that arrives in parts of this size.
    fn items(body: &[u8], part: usize) -> Vec<String> {
        let mut splitter = JsonSplitter::new(12);
        let mut items = Vec::new();
        for part in body.chunks(part) {
            splitter.push(Bytes::copy_from_slice(part));
            while let Some(item) = splitter.next() {
                items.push(item);
            }
        }
        items.extend(splitter.finish());
        let show = |item| match item {
            Item::Text(text) => String::from_utf8_lossy(&text).into_owned(),
            Item::TooLong => "too long".to_owned(),
            Item::Broken(why) => format!("broken: {why}"),
        };
        items.into_iter().map(show).collect()
    }

    #[test]
    fn lines_and_arrays_are_split_wherever_the_body_breaks() {
        let not_ended = "broken: the array is not closed";
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
            ("[1] 2", &["1", "broken: text after the end of the array"]),
            ("[1]][2]", &["1", "broken: text after the end of the array"]),
            ("[", &[not_ended]),
            ("[1,{\"a\":2}", &["1", not_ended]),
            ("[\"1,2]", &[not_ended]),
            ("\u{feff}[1]", &["1"]),
            ("\u{feff}\u{feff} {}\n{}", &["{}", "{}"]),
            ("\u{feff}", &[]),
        ] {
            for part in [1, 2, 3, 5, 100] {
                assert_eq!(items(body.as_bytes(), part), expected, "{body:?} in parts of {part}");
            }
        }
        for (body, expected) in [(&b"\xef\xbb"[..], "\u{fffd}"), (b"\xef[1]", "\u{fffd}[1]")] {
            assert_eq!(items(body, 1), [expected], "{body:?}");
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
        #[test]
        fn serialized_values_are_split_into_the_same_values(
            values in prop::collection::vec(any_json(), 0..6), lines: bool, pretty: bool, part in 1_usize..40,
        ) {
            // A first line that is an array would be the enclosing array.
            prop_assume!(!lines || !values.first().is_some_and(Value::is_array));
            let body = match (lines, pretty) {
                (true, _) => values.iter().map(|value| format!("{value}\n")).collect(),
                (false, true) => serde_json::to_string_pretty(&values).unwrap(),
                (false, false) => serde_json::to_string(&values).unwrap(),
            };
            let mut splitter = JsonSplitter::new(usize::MAX);
            let mut read = Vec::new();
            for part in body.as_bytes().chunks(part) {
                splitter.push(Bytes::copy_from_slice(part));
                while let Some(item) = splitter.next() {
                    let Item::Text(text) = item else { panic!("{item:?}") };
                    read.push(serde_json::from_slice::<Value>(&text).unwrap());
                }
            }
            prop_assert_eq!(splitter.finish(), None);
            prop_assert_eq!(read, values);
        }

        #[test]
        fn any_bytes_are_split_within_bounds(
            body in prop_oneof![any::<Vec<u8>>(), prop::collection::vec(prop::sample::select(b"[]{}\",\\ \n1".to_vec()), 0..60)],
            part in 1_usize..20,
        ) {
            let mut splitter = JsonSplitter::new(8);
            for part in body.chunks(part) {
                splitter.push(Bytes::copy_from_slice(part));
                while let Some(item) = splitter.next() {
                    prop_assert!(!matches!(item, Item::Text(text) if text.len() > 8));
                }
                prop_assert!(splitter.text.len() <= 8);
            }
            splitter.finish();
        }
    }
}
