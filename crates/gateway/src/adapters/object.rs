//! A JSON object of a webhook, with raw values. Adapters take the members that they map; the remaining members go into
//! the metadata.

use std::{borrow::Cow, cmp::Reverse};

use contract::{
    command::MAX_TEXT_CHARS,
    json::{self, Members},
    process::MAX_URL_BYTES,
};
use serde_json::value::RawValue;

/// An object whose values are borrowed from the webhook's body.
#[derive(Debug, Default, Clone)]
pub(super) struct Object<'a> {
    members: Vec<(Cow<'a, str>, &'a RawValue)>,
}

impl<'a> Object<'a> {
    /// Parses a JSON object. None for any other JSON.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let members = json::members(text).ok()?;
        let borrowed = |(name, value): (Cow<'a, str>, Cow<'a, RawValue>)| match value {
            Cow::Borrowed(value) => Some((name, value)),
            Cow::Owned(_) => None,
        };
        Some(Self { members: members.into_iter().filter_map(borrowed).collect() })
    }

    /// The value of a member; null counts as absent.
    pub(super) fn raw(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.members.iter().find(|(member, _)| member == name);
        found.map(|(_, value)| *value).filter(|value| value.get() != "null")
    }

    /// A member that is an object.
    pub(super) fn object(&self, name: &str) -> Option<Self> {
        Self::parse(self.raw(name)?.get())
    }

    /// A member that is a text and not empty.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        serde_json::from_str(self.raw(name)?.get()).ok().filter(|text: &String| !text.is_empty())
    }

    /// A member that is a number, or a text that is one.
    pub(super) fn number(&self, name: &str) -> Option<f64> {
        let raw = self.raw(name)?.get();
        let number = serde_json::from_str(raw).ok().or_else(|| self.text(name)?.parse().ok());
        number.filter(|number: &f64| number.is_finite())
    }

    /// A member that is true or false.
    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        serde_json::from_str(self.raw(name)?.get()).ok()
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.members.retain(|(member, _)| member != name);
    }

    /// Takes a text that is short enough for a status or disposition. Any other value stays.
    pub(super) fn take_short_text(&mut self, name: &str) -> Option<String> {
        let text = self.text(name).filter(|text| text.chars().nth(MAX_TEXT_CHARS).is_none())?;
        self.remove(name);
        Some(text)
    }

    /// Takes a text of any length. Any other value stays.
    pub(super) fn take_text(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        self.remove(name);
        Some(text)
    }

    /// Takes a URL. A URL that is too long for a result stays.
    pub(super) fn take_url(&mut self, name: &str) -> Option<String> {
        let url = self.text(name).filter(|url| url.len() <= MAX_URL_BYTES)?;
        self.remove(name);
        Some(url)
    }

    /// Takes an object. Any other value stays.
    pub(super) fn take_object(&mut self, name: &str) -> Option<Self> {
        let object = self.object(name)?;
        self.remove(name);
        Some(object)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// An upper bound of the size of its JSON, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.members.iter().map(member_bytes).sum::<usize>() + 2
    }

    /// Removes the largest members until the others have at most `max_bytes`. Returns the removed names, the largest
    /// member first.
    pub(super) fn shrink_to(&mut self, max_bytes: usize) -> Vec<String> {
        let mut bytes = self.bytes();
        if bytes <= max_bytes {
            return Vec::new();
        }
        self.members.sort_by_cached_key(|member| Reverse(member_bytes(member)));
        let mut kept = self.members.split_off(0).into_iter();
        let mut removed = Vec::new();
        while bytes > max_bytes
            && let Some(member) = kept.next()
        {
            bytes -= member_bytes(&member);
            removed.push(member.0.into_owned());
        }
        self.members = kept.collect();
        removed
    }

    pub(super) fn into_members(self) -> Members<'a> {
        self.members.into_iter().map(|(name, value)| (name, Cow::Borrowed(value))).collect()
    }
}

/// An upper bound of the size of a member's JSON, in bytes. A byte of the name may need an escape of six bytes.
fn member_bytes((name, value): &(Cow<'_, str>, &RawValue)) -> usize {
    name.len() * 6 + value.get().len() + 4
}

pub(super) fn whole_seconds(seconds: f64) -> Option<u32> {
    let rounded = seconds.round();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the range, and whole")]
    (0.0..=f64::from(u32::MAX)).contains(&rounded).then_some(rounded as u32)
}
