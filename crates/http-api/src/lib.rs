//! The requests and responses of the HTTP API. The gateway writes them, clients in Rust read them, and the OpenAPI
//! document is generated from them, so each shape is declared once.
//!
//! Responses are made from the replies of lead-state and webhook-notifier ([`contract::rpc`]) with `From`: the HTTP API
//! writes times as RFC 3339 texts, the services as milliseconds.

mod calls;
mod convert;
mod deliveries;
mod examples;
mod keys;
mod leads;
mod processes;
mod response;
mod statistics;
#[cfg(test)]
mod tests;
mod time;
mod updates;

pub use crate::{
    calls::{Call, CallActivity, CallEndedRequest, CallStartedRequest, EventIgnored},
    deliveries::{
        BackfillRequest, CallbackFailures, CallbackFailuresResponse, DeliveryDetails, FailureGroup, ListedDelivery,
        RecoverRequest, RecoverResult,
    },
    examples::Example,
    keys::ApiKey,
    leads::{
        Activity, BulkInitiateRequest, BulkInitiateResponse, Details, HistoryEntry, InitiateRequest, InitiateResponse,
        InitiatedLead, Lead, LeadDetails, LeadWith, ListedLead, ListedUpdate, NewLead, OnExisting, RefusedLead,
        Upserted, Versioned,
    },
    processes::{
        CallbackHealth, CallbackResponse, CallbackWithHealth, ChangeResponse, ConfiguredCallback, ConfiguredProcess,
        ConfiguredSource, EnableResult, PauseResult, RotateSecretRequest, SecretExpiry, TestResult,
    },
    response::{DataResponse, ErrorResponse, ListResponse},
    statistics::{
        CallStatistics, CallStatisticsRequest, DeliveryCounts, InterestedCalls, InterestedDay, Statistics,
        StatisticsResponse, UniqueLeads, UpdateCounts,
    },
    time::DateTime,
    updates::{
        Attempt, BulkUpdateLine, BulkUpdateResult, Delivery, DryRunOutcome, DryRunResponse, Event, LineExpectations,
        Outcome, Parked, TimelineResponse, UpdateAccepted, UpdateRequest, UpdateTimeline,
    },
};
