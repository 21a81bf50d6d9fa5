//! The queries. Each row gives the subject of a request, its reply, and whether it may be sent more than once.

use std::time::Duration;

use super::*;
use crate::{event::CompletionEvent, key::ApiKey, process::Process};

/// The default timeout of a query.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// A request that one of the services answers. Unknown fields are refused: in NATS, any publisher can name the subject
/// of a query as its reply subject, and such a reply must not be read as a query.
pub trait Query: Sized + Send + Sync + 'static {
    /// The subject of the micro service's endpoint.
    const SUBJECT: &'static str;
    /// Whether the request may be sent to several instances: several executions leave the same state as one.
    const REPEATABLE: bool;
    /// How long the caller waits for the reply.
    const TIMEOUT: Duration = DEFAULT_TIMEOUT;
    /// The reply of the service.
    type Reply: Send + 'static;

    // The methods below read and write JSON, so that their code is compiled in this crate and not again in each
    // service.

    /// Reads a request.
    ///
    /// # Errors
    /// It is not the JSON of such a request.
    fn from_json(request: &[u8]) -> serde_json::Result<Self>;

    /// Writes the request.
    ///
    /// # Errors
    /// Never for the queries of this crate, because all keys of maps are texts.
    fn to_json(&self) -> serde_json::Result<Vec<u8>>;

    /// Reads a reply.
    ///
    /// # Errors
    /// It is not the JSON of such a reply.
    fn reply_from_json(reply: &[u8]) -> serde_json::Result<Self::Reply>;

    /// Writes a reply.
    ///
    /// # Errors
    /// Those of [`Query::to_json`].
    fn reply_to_json(reply: &Self::Reply) -> serde_json::Result<Vec<u8>>;
}

/// Implements [`Query`] for each row, and lists the rows for the generated documents.
macro_rules! queries {
    ($($request:ident $subject:literal $sent:ident $(within $timeout:ident)? => $shape:ident $reply:ident;)*) => {
        $(impl Query for $request {
            const SUBJECT: &'static str = $subject;
            const REPEATABLE: bool = queries!(@repeatable $sent);
            $(const TIMEOUT: Duration = $timeout;)?
            type Reply = queries!(@reply $shape $reply);

            fn from_json(request: &[u8]) -> serde_json::Result<Self> {
                serde_json::from_slice(request)
            }

            fn to_json(&self) -> serde_json::Result<Vec<u8>> {
                serde_json::to_vec(self)
            }

            fn reply_from_json(reply: &[u8]) -> serde_json::Result<Self::Reply> {
                serde_json::from_slice(reply)
            }

            fn reply_to_json(reply: &Self::Reply) -> serde_json::Result<Vec<u8>> {
                serde_json::to_vec(reply)
            }
        })*

        /// The subjects of all queries.
        pub const SUBJECTS: &[&str] = &[$($subject),*];

        /// The subjects of the queries that read this body.
        #[cfg(test)]
        fn readers(body: &str) -> Vec<&'static str> {
            let mut readers = Vec::new();
            $(if serde_json::from_str::<$request>(body).is_ok() {
                readers.push($subject);
            })*
            readers
        }

        /// Every query, in the order of the documents.
        #[cfg(feature = "schema")]
        pub fn catalog() -> Vec<crate::schema::QueryEntry> {
            vec![$(crate::schema::QueryEntry::new::<$request, queries!(@document $shape $reply)>(queries!(@list $shape))),*]
        }
    };
    (@repeatable repeatable) => { true };
    (@repeatable once) => { false };
    (@reply one $reply:ident) => { $reply };
    (@reply page $reply:ident) => { Page<$reply> };
    (@reply list $reply:ident) => { Vec<$reply> };
    (@document page $reply:ident) => { Page<$reply> };
    (@document $shape:ident $reply:ident) => { $reply };
    (@list list) => { true };
    (@list $shape:ident) => { false };
}

queries! {
    GetLead "leads.rpc.lead.get" repeatable => one Lead;
    InitiateLead "leads.rpc.lead.initiate" once => one Lead;
    // Leads in lists have no activities.
    ListLeads "leads.rpc.lead.list" repeatable => page Lead;
    GetLeadHistory "leads.rpc.lead.history" repeatable => page HistoryEntry;
    ListCalls "leads.rpc.lead.calls" repeatable => page Call;
    GetUpdate "leads.rpc.update.get" repeatable => one Update;
    // The event that would be announced, under an id that no update has.
    DryRunUpdate "leads.rpc.update.dry_run" repeatable => one CompletionEvent;
    ListUpdates "leads.rpc.update.list" repeatable => page ListedUpdate;
    FindUpdates "leads.rpc.update.find" repeatable => page FoundUpdate;
    // In the order of the request; as many as fit into a message, at least one if there is any.
    GetOutcomes "leads.rpc.update.outcomes" repeatable => list Outcome;
    // The same for events.
    GetEvents "leads.rpc.update.events" repeatable => list LedgerEvent;
    CountUpdates "leads.rpc.update.count" repeatable => list UpdateCounts;
    CountActivities "leads.rpc.update.activities" repeatable => one ActivityCounts;
    CreateProject "leads.rpc.project.create" once => one Project;
    ApplyProcess "leads.rpc.process.apply" once => one ProcessChangeResult;
    // Processes are answered without their secrets.
    ListProcesses "leads.rpc.process.list" repeatable => page Process;
    GetProcess "leads.rpc.process.get" repeatable => one Process;
    ChangeProcess "leads.rpc.process.change" once => one ProcessChangeResult;
    CreateKey "leads.rpc.key.create" once => one ApiKey;
    RevokeKey "leads.rpc.key.revoke" once => one ApiKey;
    ListKeys "leads.rpc.key.list" repeatable => page ApiKey;
    RotateSecrets "leads.rpc.secrets.rotate" once => one RotationResult;
    GetLag "leads.rpc.lag.get" repeatable => one Lag;
    GetRecovery "leads.rpc.recovery.get" repeatable => one RecoveryStatus;
    Recover "leads.rpc.recovery.recover" once => one RecoveryStatus;
    ListUpdateDeliveries "webhooks.rpc.delivery.list_of_update" repeatable => one UpdateDeliveries;
    ListDeliveries "webhooks.rpc.delivery.list" repeatable => page ListedDelivery;
    GetDelivery "webhooks.rpc.delivery.get" repeatable => one Delivery;
    Redeliver "webhooks.rpc.delivery.redeliver" once => one ListedDelivery;
    RecoverDeliveries "webhooks.rpc.delivery.recover" once => one RecoveredDeliveries;
    CountDeliveries "webhooks.rpc.delivery.count" repeatable => list DeliveryCounts;
    GroupFailures "webhooks.rpc.delivery.failures" repeatable => one CallbackFailures;
    ListCallbacks "webhooks.rpc.callback.list" repeatable => list CallbackStatus;
    EnableCallback "webhooks.rpc.callback.enable" repeatable => one EnableResult;
    PauseCallback "webhooks.rpc.callback.pause" repeatable => one PauseResult;
    BackfillCallback "webhooks.rpc.callback.backfill" once => one RecoveredDeliveries;
    // In the order of the request.
    CheckUrls "webhooks.rpc.callback.check" repeatable => list UrlCheck;
    TestCallback "webhooks.rpc.callback.test" once within TEST_TIMEOUT => one TestResult;
    VerifyReport "webhooks.rpc.source.verify" repeatable => one VerifiedReport;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_is_not_a_query() {
        for reply in [
            r#"{"stream":"LEAD_COMMANDS","seq":7}"#,
            r#"{"stream":"LEAD_COMMANDS","domain":"d","seq":7,"duplicate":true}"#,
            r#"{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"S","seq":0}"#,
            r#"{"type":"io.nats.jetstream.api.v1.stream_purge_response","success":true,"purged":6}"#,
            "",
        ] {
            assert_eq!(readers(reply), [""; 0], "{reply}");
        }
        assert_eq!(readers("{}"), ["leads.rpc.secrets.rotate", "leads.rpc.lag.get", "leads.rpc.recovery.get"]);
    }
}
