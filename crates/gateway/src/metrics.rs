//! 1 Accept: the gateway's metrics.

use std::{collections::HashMap, time::Instant};

use axum::http::StatusCode;
use service_kit::metrics::{
    Counter, Family, Gauge, Histogram, Label, Labels, Publishing, Register, Registry, Unit, durations, sizes,
};

/// The route of requests for unknown paths.
const NO_ROUTE: &str = "none";

/// How requests end: with a class of status, or `gone` if the client hung up before the response.
const ENDS: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "gone"];
const GONE: usize = ENDS.len() - 1;

#[derive(Debug)]
pub(crate) struct Metrics {
    refused: Family<Label, Counter>,
    in_flight: Gauge,
    routes: HashMap<&'static str, Route>,
    pub(crate) publishing: Publishing,
    /// Commands of HTTP clients per message of the log.
    pub(crate) pack_sizes: Histogram,
}

/// The metrics of a route, resolved once so that a request locks no family.
#[derive(Debug)]
struct Route {
    ends: [Counter; ENDS.len()],
    duration: Histogram,
}

impl Metrics {
    /// Registers the metrics; `paths` are the routes.
    pub(crate) fn new(registry: &mut Registry, paths: impl Iterator<Item = &'static str>) -> Self {
        let refused = Family::<Label, Counter>::default();
        registry.register("requests_refused", "Requests that were refused, by code", refused.clone());
        let in_flight = Gauge::default();
        registry.register("requests_in_flight", "Requests without a response yet", in_flight.clone());
        let requests = Family::<Labels, Counter>::default();
        registry.register(
            "requests",
            "Requests, by route and class of the response's status (gone: the client hung up first)",
            requests.clone(),
        );
        let durations = Family::<Label, Histogram>::new_with_constructor(durations);
        registry.register_with_unit(
            "request_duration",
            "Time from request head to response head, by route",
            Unit::Seconds,
            durations.clone(),
        );
        let routes = paths.chain([NO_ROUTE]).map(|path| {
            let ends = ENDS.map(|end| requests.get_or_create_owned(&[("route", path), ("status", end)]));
            (path, Route { ends, duration: durations.get_or_create_owned(&[("route", path)]) })
        });
        let publishing = Publishing::new(registry);
        let commands = Unit::Other("commands".into());
        let help = "Commands of HTTP clients per message of the log";
        let pack_sizes = registry.add_unit("pack", commands, help, sizes());
        Self { refused, in_flight, routes: routes.collect(), publishing, pack_sizes }
    }

    /// Counts a refused request or line.
    pub(crate) fn count_refusal(&self, code: &'static str) {
        self.refused.get_or_create(&[("code", code)]).inc();
    }

    /// Starts the timer of a request. Dropped without [`stop`](RequestTimer::stop), it counts as gone.
    pub(crate) fn start(&self, route: Option<&str>) -> RequestTimer<'_> {
        let route = route.and_then(|path| self.routes.get(path)).or_else(|| self.routes.get(NO_ROUTE));
        self.in_flight.inc();
        RequestTimer { in_flight: &self.in_flight, route, at: Instant::now(), end: GONE }
    }
}

#[derive(Debug)]
pub(crate) struct RequestTimer<'a> {
    in_flight: &'a Gauge,
    route: Option<&'a Route>,
    at: Instant,
    end: usize,
}

impl RequestTimer<'_> {
    pub(crate) fn stop(mut self, status: StatusCode) {
        // A status has three digits, the first at least 1.
        self.end = usize::from(status.as_u16() / 100 - 1).min(GONE - 1);
    }
}

impl Drop for RequestTimer<'_> {
    fn drop(&mut self) {
        self.in_flight.dec();
        if let Some(route) = self.route {
            route.ends[self.end].inc();
            route.duration.observe(self.at.elapsed().as_secs_f64());
        }
    }
}
