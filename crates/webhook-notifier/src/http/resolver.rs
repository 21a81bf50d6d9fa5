//! Resolves the names of callbacks to addresses that the guard allows. The connection uses these addresses.

use std::{
    error::Error,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
};

use contract::ObjectId;
use futures::future::BoxFuture;
use hyper_util::client::legacy::connect::dns::Name;
use tower_service::Service;

use super::{
    dns::{Dns, LookupError},
    guard::{Guard, Refused},
};

tokio::task_local! {
    /// The destination of the request that is being sent: hyper passes only the host to the resolver.
    pub(crate) static DESTINATION: Destination;
}

/// The parts of a request's destination that the guard needs besides the name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Destination {
    pub(crate) project_id: ObjectId,
    pub(crate) port: u16,
}

type Lookup = dyn Fn(ObjectId, String) -> BoxFuture<'static, Result<Vec<IpAddr>, LookupError>> + Send + Sync;

#[derive(Clone)]
pub(crate) struct Resolver {
    guard: Guard,
    lookup: Arc<Lookup>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("guard", &self.guard).finish_non_exhaustive()
    }
}

impl Resolver {
    pub(crate) fn new(guard: Guard, dns: Arc<Dns>) -> Self {
        Self::with_lookup(guard, move |project_id, name| {
            let dns = dns.clone();
            async move { dns.look_up_for(project_id, &name).await }
        })
    }

    pub(crate) fn with_lookup<F>(guard: Guard, lookup: impl Fn(ObjectId, String) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Vec<IpAddr>, LookupError>> + Send + 'static,
    {
        Self { guard, lookup: Arc::new(move |project_id, name| Box::pin(lookup(project_id, name))) }
    }

    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (guard, lookup) = (self.guard.clone(), self.lookup.clone());
        Box::pin(async move {
            // The request's own task makes the first poll, so its destination is set.
            let Destination { project_id, port } = DESTINATION.try_get()?;
            let found = lookup(project_id, name.as_str().to_owned()).await?;
            let allowed: Result<_, Refused> = guard.filter(name.as_str(), port, found);
            // The connector sets the port of the URL.
            let addresses = allowed?.into_iter().map(|address| SocketAddr::new(address, 0)).collect::<Vec<_>>();
            Ok(addresses.into_iter())
        })
    }
}
