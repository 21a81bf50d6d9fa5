//! The types that adapters share: a call, its size-limited result, and the body of the call event.

use std::borrow::Cow;

use contract::{
    JsonObject, ObjectId,
    call_result::{CallDirection, CallResult, MAX_RESULT_BYTES},
    event::OutcomeKind,
    fields::BodyError,
    json::Members,
    text,
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::object::Object;

/// The limit of a result. The rest of [`MAX_RESULT_BYTES`] is for the names of omitted fields.
const RESULT_BYTES: usize = MAX_RESULT_BYTES - (4 << 10);
/// The metadata member with the names of omitted fields.
const OMITTED: &str = "omitted";
/// Most names in [`OMITTED`], and most characters of each name.
const MAX_NAMES: usize = 16;
const MAX_NAME_CHARS: usize = 32;

/// A call event, as the body of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CallReport {
    pub(crate) kind: OutcomeKind,
    /// Identifies the event: a repeated webhook has the same call and the same step.
    pub(crate) id: ReportId,
    pub(crate) body: Vec<u8>,
    /// The names of omitted fields.
    pub(crate) omitted: Vec<String>,
}

/// A step of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReportId {
    pub(crate) call_id: String,
    pub(crate) step: &'static str,
}

/// What an adapter reads from a webhook.
pub(super) enum Event<'a> {
    Started(Call<'a>),
    /// The call ended, and its result is reported with another webhook.
    Ended(Call<'a>),
    /// The call ended, with this result.
    Completed(Call<'a>, CallDraft<'a>),
    Other(String),
}

/// The call that a webhook is about.
pub(super) struct Call<'a> {
    pub(super) id: String,
    /// The customer's own metadata of the call. It names the lead.
    pub(super) metadata: Option<Object<'a>>,
}

/// The result of a call, before its size is limited.
#[derive(Default)]
pub(super) struct CallDraft<'a> {
    pub(super) status: Option<String>,
    pub(super) connected: Option<bool>,
    pub(super) direction: Option<CallDirection>,
    pub(super) disposition: Option<String>,
    pub(super) summary: Option<String>,
    pub(super) analysis: Object<'a>,
    pub(super) recording_url: Option<String>,
    pub(super) duration_seconds: Option<u32>,
    pub(super) metadata: Object<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CallBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    lead_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process_id: Option<Cow<'a, RawValue>>,
    call_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<CallResult>,
}

impl<'a> Call<'a> {
    /// # Errors
    /// The metadata names no lead.
    pub(super) fn report(
        self,
        kind: OutcomeKind,
        step: &'static str,
        result: Option<CallDraft<'a>>,
        process_id: Option<ObjectId>,
    ) -> Result<CallReport, BodyError> {
        let named = |name| self.metadata.as_ref().and_then(|metadata| metadata.raw(name));
        let (lead_id, reference_id) = (named("leadId"), named("referenceId"));
        if lead_id.is_none() && reference_id.is_none() {
            let hint = "; name the lead in the metadata of the call, when you create the call";
            return Err(BodyError::AddressMissing(Some(hint.into())));
        }
        let own_process = || process_id.and_then(|id| to_raw_value(&id).ok()).map(Cow::Owned);
        let process_id = reference_id.and_then(|_| named("processId").map(Cow::Borrowed).or_else(own_process));
        let (result, omitted) =
            result.map(CallDraft::fit).map_or((None, Vec::new()), |(one, other)| (Some(one), other));
        let body = CallBody { lead_id, reference_id, process_id, call_id: &self.id, result };
        #[allow(clippy::expect_used, reason = "texts, numbers and raw values always serialize")]
        let body = serde_json::to_vec(&body).expect("a call event serializes");
        Ok(CallReport { kind, id: ReportId { call_id: self.id, step }, body, omitted })
    }
}

pub(super) const fn direction(is_incoming: bool) -> CallDirection {
    if is_incoming { CallDirection::Incoming } else { CallDirection::Outgoing }
}

/// Shortens a list of field names to [`MAX_NAMES`] names and the number of the others.
fn named(fields: &[String]) -> Vec<String> {
    let names = fields.iter().take(MAX_NAMES).map(|name| text::prefix(name, MAX_NAME_CHARS).to_owned());
    let more = fields.len().checked_sub(MAX_NAMES + 1).map(|more| format!("and {} more", more + 1));
    names.chain(more).collect()
}

impl CallDraft<'_> {
    /// Limits the size of the result: leaves out metadata, the largest members first, then the analysis, then the
    /// summary. Also returns the names of what is left out.
    fn fit(mut self) -> (CallResult, Vec<String>) {
        let others = self.bytes() - self.metadata.bytes();
        let mut omitted = self.metadata.shrink_to(RESULT_BYTES.saturating_sub(others));
        if self.bytes() > RESULT_BYTES && !self.analysis.is_empty() {
            self.analysis = Object::default();
            omitted.push("analysis".into());
        }
        if self.bytes() > RESULT_BYTES && self.summary.take().is_some() {
            omitted.push("summary".into());
        }
        let omitted = named(&omitted);
        let mut metadata = self.metadata.into_members();
        if !omitted.is_empty()
            && let Ok(names) = to_raw_value(&omitted)
        {
            metadata.insert(OMITTED.into(), Cow::Owned(names));
        }
        let object = |members: Members<'_>| (!members.is_empty()).then(|| JsonObject::from_members(&members));
        let result = CallResult {
            status: self.status,
            connected: self.connected,
            direction: self.direction,
            disposition: self.disposition,
            summary: self.summary,
            analysis: object(self.analysis.into_members()),
            recording_url: self.recording_url,
            transcript_url: None,
            duration_seconds: self.duration_seconds,
            metadata: object(metadata),
        };
        (result, omitted)
    }

    /// An upper bound of the size of the result's JSON, in bytes.
    fn bytes(&self) -> usize {
        // A byte of a text has at most six bytes in JSON. Only the summary is long enough to be worth measuring.
        let summary = serde_json::to_string(&self.summary).map_or(0, |text| text.len());
        let texts = [&self.status, &self.disposition, &self.recording_url];
        let texts: usize = texts.into_iter().flatten().map(|text| text.len() * 6).sum();
        summary + texts + self.analysis.bytes() + self.metadata.bytes() + 512
    }
}
