//! 1 Accept: the endpoints, a row each: method, path, scope, rate class, and the module with its handler.
//!
//! A new endpoint is a file, its `mod` line and its row here. The file has the handler (`handle`), its part of the
//! OpenAPI document (`operation`) and its tests.

use std::sync::Arc;

use axum::{Router, routing::MethodFilter};
use contract::key::Scope;

use crate::{
    app::App,
    rate_limit::RateClass,
    router::{self, Endpoint},
};

pub(crate) mod docs;

pub(crate) mod leads {
    pub(crate) mod bulk_initiate;
    pub(crate) mod bulk_update;
    pub(crate) mod dry_run;
    pub(crate) mod erase;
    pub(crate) mod get;
    pub(crate) mod history;
    pub(crate) mod initiate;
    pub(crate) mod list;
    pub(crate) mod update;
}

pub(crate) mod calls {
    pub(crate) mod bulk_ended;
    pub(crate) mod bulk_started;
    pub(crate) mod ended;
    pub(crate) mod ingest;
    pub(crate) mod list;
    pub(crate) mod started;
}

pub(crate) mod activities {
    pub(crate) mod get;
}

pub(crate) mod updates {
    pub(crate) mod get;
    pub(crate) mod list;
}

pub(crate) mod events {
    pub(crate) mod follow;
}

pub(crate) mod deliveries {
    pub(crate) mod get;
    pub(crate) mod list;
    pub(crate) mod recover;
    pub(crate) mod redeliver;
}

pub(crate) mod statistics {
    pub(crate) mod calls;
    pub(crate) mod get;
}

pub(crate) mod keys {
    pub(crate) mod list;
    pub(crate) mod revoke;
}

pub(crate) mod processes {
    pub(crate) mod change;
    pub(crate) mod create;
    pub(crate) mod get;
    pub(crate) mod list;
    pub(crate) mod put;
    pub(crate) mod spec;
}

pub(crate) mod callbacks {
    pub(crate) mod backfill;
    pub(crate) mod create;
    pub(crate) mod delete;
    pub(crate) mod enable;
    pub(crate) mod failures;
    pub(crate) mod get;
    pub(crate) mod list;
    pub(crate) mod pause;
    pub(crate) mod put;
    pub(crate) mod resume;
    pub(crate) mod rotate_secret;
    pub(crate) mod test;
}

pub(crate) mod sources {
    pub(crate) mod create;
    pub(crate) mod delete;
    pub(crate) mod get;
    pub(crate) mod list;
    pub(crate) mod put;
}

#[cfg(test)]
mod tests;

/// The endpoint of voice platforms, whose requests have no API key.
pub(crate) const INGEST: &str = calls::ingest::PATH;

macro_rules! endpoints {
    ($($method:ident $path:literal $scope:ident $rate:ident $($module:ident)::+;)*) => {
        /// All endpoints that need an API key. The router is made from the same rows.
        pub const ENDPOINTS: &[Endpoint] =
            &[$(Endpoint::new(stringify!($method), $path, Scope::$scope, RateClass::$rate)),*];

        pub(crate) fn router(app: Arc<App>) -> Router {
            let router = Router::new();
            $(
                let row = Endpoint::new(stringify!($method), $path, Scope::$scope, RateClass::$rate);
                let serve = || router::endpoint(MethodFilter::$method, row, $($module)::+::handle);
                // A slash at the end is a common mistake in URLs, and names no other resource.
                let router = router.route($path, serve()).route(concat!($path, "/"), serve());
            )*
            let ingest = || router::unkeyed(MethodFilter::POST, calls::ingest::handle);
            let router = router.route(INGEST, ingest()).route(&format!("{INGEST}/"), ingest());
            router::with_fallbacks(router.merge(docs::routes()), app)
        }

        /// The endpoints with their descriptions for the OpenAPI document.
        #[cfg(test)]
        pub(crate) fn operations() -> Vec<(Endpoint, crate::openapi::Operation)> {
            ENDPOINTS.iter().copied().zip([$($($module)::+::operation()),*]).collect()
        }
    };
}

endpoints! {
    POST   "/api/v1/leads/update"                                             LeadsWrite  Updates leads::update;
    // Each update in the body counts against the rate of updates, too.
    POST   "/api/v1/leads/update/bulk"                                        LeadsWrite  Other   leads::bulk_update;
    POST   "/api/v1/calls/started"                                            CallsWrite  Updates calls::started;
    POST   "/api/v1/calls/ended"                                              CallsWrite  Updates calls::ended;
    POST   "/api/v1/calls/started/bulk"                                       CallsWrite  Other   calls::bulk_started;
    POST   "/api/v1/calls/ended/bulk"                                         CallsWrite  Other   calls::bulk_ended;
    GET    "/api/v1/calls"                                                    LeadsRead   Other   calls::list;
    GET    "/api/v1/activities/{activityId}"                                  LeadsRead   Other   activities::get;
    GET    "/api/v1/updates"                                                  LeadsRead   Other   updates::list;
    GET    "/api/v1/updates/{updateId}"                                       LeadsRead   Other   updates::get;
    POST   "/api/v1/leads/initiate"                                           LeadsWrite  Other   leads::initiate;
    POST   "/api/v1/leads/bulk/initiate"                                      LeadsWrite  Other   leads::bulk_initiate;
    GET    "/api/v1/leads/get"                                                LeadsRead   Other   leads::get;
    GET    "/api/v1/leads"                                                    LeadsRead   Other   leads::list;
    DELETE "/api/v1/leads/{leadId}"                                           LeadsErase  Updates leads::erase;
    GET    "/api/v1/leads/{leadId}/updates"                                   LeadsRead   Other   leads::history;
    GET    "/api/v1/events"                                                   LeadsRead   Other   events::follow;
    GET    "/api/v1/deliveries"                                               LeadsRead   Other   deliveries::list;
    GET    "/api/v1/deliveries/{deliveryId}"                                  LeadsRead   Other   deliveries::get;
    POST   "/api/v1/deliveries/{deliveryId}/redeliver"                        LeadsWrite  Other   deliveries::redeliver;
    POST   "/api/v1/deliveries/recover"                                       LeadsWrite  Other   deliveries::recover;
    GET    "/api/v1/stats"                                                    LeadsRead   Other   statistics::get;
    POST   "/api/v1/analytics/customer/stats"                                 LeadsRead   Other   statistics::calls;
    GET    "/api/v1/keys"                                                     ConfigRead  Other   keys::list;
    POST   "/api/v1/keys/{keyId}/revoke"                                      ConfigWrite Other   keys::revoke;
    GET    "/api/v1/processes"                                                ConfigRead  Other   processes::list;
    POST   "/api/v1/processes"                                                ConfigWrite Other   processes::create;
    GET    "/api/v1/processes/{processId}"                                    ConfigRead  Other   processes::get;
    PUT    "/api/v1/processes/{processId}"                                    ConfigWrite Other   processes::put;
    GET    "/api/v1/processes/{processId}/callbacks"                          ConfigRead  Other   callbacks::list;
    POST   "/api/v1/processes/{processId}/callbacks"                          ConfigWrite Other   callbacks::create;
    GET    "/api/v1/processes/{processId}/callbacks/{callbackId}"             ConfigRead  Other   callbacks::get;
    PUT    "/api/v1/processes/{processId}/callbacks/{callbackId}"             ConfigWrite Other   callbacks::put;
    DELETE "/api/v1/processes/{processId}/callbacks/{callbackId}"             ConfigWrite Other   callbacks::delete;
    GET    "/api/v1/processes/{processId}/callbacks/{callbackId}/failures"    LeadsRead   Other   callbacks::failures;
    POST   "/api/v1/processes/{processId}/callbacks/{callbackId}/rotate-secret" ConfigWrite Other callbacks::rotate_secret;
    POST   "/api/v1/processes/{processId}/callbacks/{callbackId}/test"        ConfigWrite Other   callbacks::test;
    POST   "/api/v1/processes/{processId}/callbacks/{callbackId}/enable"      ConfigWrite Other   callbacks::enable;
    POST   "/api/v1/processes/{processId}/callbacks/{callbackId}/pause"       ConfigWrite Other   callbacks::pause;
    POST   "/api/v1/processes/{processId}/callbacks/{callbackId}/resume"      ConfigWrite Other   callbacks::resume;
    POST   "/api/v1/processes/{processId}/callbacks/{callbackId}/backfill"    ConfigWrite Other   callbacks::backfill;
    GET    "/api/v1/processes/{processId}/sources"                            ConfigRead  Other   sources::list;
    POST   "/api/v1/processes/{processId}/sources"                            ConfigWrite Other   sources::create;
    GET    "/api/v1/processes/{processId}/sources/{sourceId}"                 ConfigRead  Other   sources::get;
    PUT    "/api/v1/processes/{processId}/sources/{sourceId}"                 ConfigWrite Other   sources::put;
    DELETE "/api/v1/processes/{processId}/sources/{sourceId}"                 ConfigWrite Other   sources::delete;
}
