//! 1 Accept: what the gateway counts.

use std::{collections::HashMap, time::Instant};

use axum::http::StatusCode;
use service_kit::metrics::{Counter, Family, Gauge, Histogram, Label, Labels, Publishing, Registry, Unit, durations};

use crate::{error::ApiError, server::ENDPOINTS};

/// The route of a request for a path that there is not.
const NO_ROUTE: &str = "none";

/// How requests ended: by the class of the answer's status, or with a client that hung up before there was an answer.
const ENDS: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "gone"];
const GONE: usize = ENDS.len() - 1;

/// The metrics of the gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    refused: Family<Label, Counter>,
    in_flight: Gauge,
    routes: HashMap<&'static str, Route>,
    pub(crate) publishing: Publishing,
}

/// What is noted of a route. Looked up once, so that a request takes no lock of a family.
#[derive(Debug)]
struct Route {
    ends: [Counter; ENDS.len()],
    duration: Histogram,
}

impl Metrics {
    /// Registers them.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let refused = Family::<Label, Counter>::default();
        registry.register("requests_refused", "Requests that were refused, by code", refused.clone());
        let in_flight = Gauge::default();
        registry.register("requests_in_flight", "Requests that have no answer yet", in_flight.clone());
        let requests = Family::<Labels, Counter>::default();
        registry.register(
            "requests",
            "Requests, by route and by the class of the answer's status (gone: the client hung up before)",
            requests.clone(),
        );
        let durations = Family::<Label, Histogram>::new_with_constructor(durations);
        registry.register_with_unit(
            "request_duration",
            "From a request's head to the head of its answer, by route",
            Unit::Seconds,
            durations.clone(),
        );
        let routes = ENDPOINTS.iter().map(|endpoint| endpoint.path).chain([NO_ROUTE]).map(|path| {
            let ends = ENDS.map(|end| requests.get_or_create_owned(&[("route", path), ("status", end)]));
            (path, Route { ends, duration: durations.get_or_create_owned(&[("route", path)]) })
        });
        Self { refused, in_flight, routes: routes.collect(), publishing: Publishing::new(registry) }
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, error: &ApiError) {
        // The codes of other services are theirs to count, and no list known here.
        let code = error.own_code().unwrap_or("query");
        self.refused.get_or_create(&[("code", code)]).inc();
    }

    /// Notes that a request for a route begins. It ends when this is dropped, at the latest.
    pub(crate) fn begin(&self, route: Option<&str>) -> Begun<'_> {
        let route = route.and_then(|path| self.routes.get(path)).or_else(|| self.routes.get(NO_ROUTE));
        self.in_flight.inc();
        Begun { in_flight: &self.in_flight, route, at: Instant::now(), end: GONE }
    }
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Begun<'a> {
    in_flight: &'a Gauge,
    route: Option<&'a Route>,
    at: Instant,
    end: usize,
}

impl Begun<'_> {
    /// Notes how it is answered.
    pub(crate) fn answered(mut self, status: StatusCode) {
        // A status has three digits, the first from 1 on.
        self.end = usize::from(status.as_u16() / 100 - 1).min(GONE - 1);
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.in_flight.dec();
        if let Some(route) = self.route {
            route.ends[self.end].inc();
            route.duration.observe(self.at.elapsed().as_secs_f64());
        }
    }
}
