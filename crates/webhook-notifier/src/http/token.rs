//! The access tokens of callbacks: kept in memory until shortly before they expire, one request for a token at a time
//! per callback.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use contract::{ObjectId, process::Oauth2Client, secret::Secret};
use http::HeaderValue;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::{request::secret_value, token_request::Grant};

/// How long before its expiry a token is replaced. A longer margin requests more tokens; a shorter one sends more
/// tokens that expire on the way.
const RENEWAL_MARGIN: Duration = Duration::from_secs(60);
/// Minimum time between two replacements of a token because the endpoint answered 401. A shorter interval lets an
/// endpoint that always answers 401 flood the token endpoint; a longer one keeps a revoked token.
const MIN_REJECTION_INTERVAL: Duration = Duration::from_secs(30);
/// How many sources are kept before unused ones are removed.
const MIN_SWEEP: usize = 64;

/// The sources of all callbacks. They outlast the revisions of their processes.
#[derive(Debug, Default)]
pub(crate) struct TokenCache(Mutex<Sources>);

#[derive(Debug)]
struct Sources {
    by_callback: HashMap<ObjectId, Arc<TokenSource>>,
    sweep_at: usize,
}

impl Default for Sources {
    fn default() -> Self {
        Self { by_callback: HashMap::new(), sweep_at: MIN_SWEEP }
    }
}

impl TokenCache {
    /// The source of a callback's tokens. A changed client gets a new source.
    pub(crate) fn source(&self, callback_id: ObjectId, client: &Oauth2Client) -> Arc<TokenSource> {
        let mut sources = lock(&self.0);
        if let Some(source) = sources.by_callback.get(&callback_id).filter(|source| source.client == *client) {
            return source.clone();
        }
        if sources.by_callback.len() >= sources.sweep_at {
            let now = Instant::now();
            sources.by_callback.retain(|_, source| Arc::strong_count(source) > 1 || source.valid_token(now).is_some());
            sources.sweep_at = MIN_SWEEP.max(2 * sources.by_callback.len());
        }
        let source = Arc::new(TokenSource::new(client.clone()));
        sources.by_callback.insert(callback_id, source.clone());
        source
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
pub(crate) struct Token {
    text: Secret,
    authorization: HeaderValue,
}

impl Token {
    pub(crate) fn text(&self) -> &str {
        self.text.expose()
    }

    /// The value of the `Authorization` header.
    pub(crate) fn authorization(&self) -> &HeaderValue {
        &self.authorization
    }
}

#[derive(Debug)]
struct CurrentToken {
    token: Arc<Token>,
    /// When a new token is requested; this one is used until it arrives.
    renew_at: Instant,
    expires_at: Instant,
}

/// The tokens of one callback.
#[derive(Debug)]
pub(crate) struct TokenSource {
    client: Oauth2Client,
    state: Mutex<TokenState>,
    /// Locked while a token is requested. Contains the last failure and its time.
    renewal: tokio::sync::Mutex<Option<(Instant, String)>>,
}

#[derive(Debug, Default)]
struct TokenState {
    current: Option<CurrentToken>,
    /// When a token was last dropped because the endpoint answered 401.
    rejected_at: Option<Instant>,
}

impl TokenSource {
    fn new(client: Oauth2Client) -> Self {
        Self { client, state: Mutex::default(), renewal: tokio::sync::Mutex::default() }
    }

    pub(crate) fn client(&self) -> &Oauth2Client {
        &self.client
    }

    fn valid_token(&self, now: Instant) -> Option<(Arc<Token>, Instant)> {
        let state = lock(&self.state);
        let current = state.current.as_ref().filter(|current| now < current.expires_at)?;
        Some((current.token.clone(), current.renew_at))
    }

    /// A token that is valid now. `get` requests a new one and gets a deadline; at most one call of it is in flight.
    /// Attempts that wait for the call share its token, or its failure.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn token(
        &self,
        deadline: Instant,
        get: impl AsyncFnOnce(Instant) -> Result<Grant, String>,
    ) -> Result<Arc<Token>, String> {
        let asked_at = Instant::now();
        if let Some((token, renew_at)) = self.valid_token(asked_at) {
            if asked_at < renew_at {
                return Ok(token);
            }
            let Ok(mut failure) = self.renewal.try_lock() else { return Ok(token) };
            // The other half of the time is for the delivery, which can still use the valid token.
            let half = asked_at + deadline.saturating_duration_since(asked_at) / 2;
            return Ok(match self.renew(&mut failure, half, get).await {
                Ok(renewed) => renewed,
                Err(e) => {
                    tracing::warn!(client_id = self.client.client_id, "a token was not renewed before its expiry: {e}");
                    self.postpone_renewal(&token);
                    token
                }
            });
        }
        let Ok(mut failure) = timeout_at(deadline, self.renewal.lock()).await else {
            return Err("the token endpoint did not answer in time".into());
        };
        if let Some((token, _)) = self.valid_token(Instant::now()) {
            return Ok(token);
        }
        match &*failure {
            Some((failed_at, e)) if asked_at <= *failed_at => Err(e.clone()),
            _ => self.renew(&mut failure, deadline, get).await,
        }
    }

    async fn renew(
        &self,
        failure: &mut Option<(Instant, String)>,
        deadline: Instant,
        get: impl AsyncFnOnce(Instant) -> Result<Grant, String>,
    ) -> Result<Arc<Token>, String> {
        // The lifetime begins when the server grants the token, which is later than this.
        let requested_at = Instant::now();
        let granted = async {
            let Grant { token, lifetime } = get(deadline).await?;
            let bearer = Zeroizing::new(format!("Bearer {}", token.expose()));
            let authorization = secret_value(&bearer).map_err(|e| e.to_string())?;
            Ok((Arc::new(Token { text: token, authorization }), lifetime))
        };
        match granted.await {
            Ok((token, lifetime)) => {
                let expires_at = requested_at + lifetime;
                let renew_at = expires_at - RENEWAL_MARGIN.min(lifetime / 4);
                *failure = None;
                lock(&self.state).current = Some(CurrentToken { token: token.clone(), renew_at, expires_at });
                Ok(token)
            }
            Err(e) => {
                let e: String = e;
                *failure = Some((Instant::now(), e.clone()));
                Err(e)
            }
        }
    }

    /// Postpones the replacement of a token by half of the time until it expires.
    fn postpone_renewal(&self, token: &Arc<Token>) {
        let now = Instant::now();
        if let Some(current) = lock(&self.state).current.as_mut().filter(|current| Arc::ptr_eq(&current.token, token)) {
            current.renew_at = now + current.expires_at.saturating_duration_since(now) / 2;
        }
    }

    /// Drops a token after the endpoint answered 401, so that the next attempt gets a new one.
    pub(crate) fn reject(&self, token: &Arc<Token>) {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let is_current = state.current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.token, token));
        let is_early = state.rejected_at.is_some_and(|at| now < at + MIN_REJECTION_INTERVAL);
        if is_current && !is_early {
            state.current = None;
            state.rejected_at = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A source, and a token endpoint that counts its requests.
    struct Fixture {
        source: Arc<TokenSource>,
        requests: AtomicUsize,
    }

    const LATENCY: Duration = Duration::from_millis(100);

    fn client(id: &str) -> Oauth2Client {
        let text = format!(r#"{{"tokenUrl":"https://id.example/token","clientId":"{id}","clientSecret":"s"}}"#);
        serde_json::from_str(&text).unwrap()
    }

    impl Fixture {
        fn new() -> Self {
            Self { source: Arc::new(TokenSource::new(client("c"))), requests: AtomicUsize::new(0) }
        }

        fn requests(&self) -> usize {
            self.requests.load(Ordering::Relaxed)
        }

        /// Requests a token; the token endpoint answers with `answer`. A token's text is the number of its request.
        async fn ask(&self, answer: Result<u64, &str>) -> Result<Arc<Token>, String> {
            let get = async |deadline| {
                let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
                let answered = timeout_at(deadline, tokio::time::sleep(LATENCY)).await;
                answered.map_err(|_| "timeout".to_owned())?;
                let lifetime = Duration::from_secs(answer?);
                Ok(Grant { token: number.to_string().into(), lifetime })
            };
            self.source.token(Instant::now() + Duration::from_secs(15), get).await
        }

        async fn text(&self, answer: Result<u64, &str>) -> Result<String, String> {
            self.ask(answer).await.map(|token| token.text().to_owned())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_shared_and_renewed_before_it_expires() {
        let fixture = Fixture::new();
        let texts = futures::future::join_all((0..50).map(|_| fixture.text(Ok(3600)))).await;
        assert!(texts.iter().all(|text| text.as_deref() == Ok("1")), "{texts:?}");
        tokio::time::advance(Duration::from_secs(3539)).await;
        assert_eq!(fixture.text(Ok(3600)).await.as_deref(), Ok("1"));
        tokio::time::advance(Duration::from_secs(2)).await;
        // One attempt renews it; the others do not wait.
        let started = Instant::now();
        let texts = futures::future::join_all((0..3).map(|_| fixture.text(Ok(3600)))).await;
        let texts: Vec<_> = texts.into_iter().map(Result::unwrap).collect();
        assert_eq!((texts, fixture.requests()), (vec!["2".to_owned(), "1".into(), "1".into()], 2));
        assert!(started.elapsed() <= LATENCY + Duration::from_millis(1));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_attempts_share_a_failure_that_is_not_cached() {
        let fixture = Fixture::new();
        let texts = futures::future::join_all((0..50).map(|_| fixture.text(Err("no")))).await;
        assert!(texts.iter().all(|text| text.as_ref().is_err_and(|e| e == "no")), "{texts:?}");
        assert_eq!(fixture.requests(), 1);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(fixture.text(Ok(60)).await.as_deref(), Ok("2"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_cannot_be_renewed_is_used_until_it_expires() {
        let fixture = Fixture::new();
        fixture.text(Ok(100)).await.unwrap();
        tokio::time::advance(Duration::from_secs(76)).await;
        for _ in 0..5 {
            assert_eq!(fixture.text(Err("no")).await.as_deref(), Ok("1"));
        }
        assert_eq!(fixture.requests(), 2, "one failed renewal is not repeated by every attempt");
        tokio::time::advance(Duration::from_secs(25)).await;
        assert_eq!(fixture.text(Err("no")).await.unwrap_err(), "no");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_token_is_replaced_once() {
        let fixture = Fixture::new();
        let token = fixture.ask(Ok(3600)).await.unwrap();
        // All attempts in flight carried the same token.
        for _ in 0..10 {
            fixture.source.reject(&token);
        }
        let second = fixture.ask(Ok(3600)).await.unwrap();
        assert_eq!(second.text(), "2");
        fixture.source.reject(&token);
        fixture.source.reject(&second);
        assert_eq!(fixture.text(Ok(3600)).await.as_deref(), Ok("2"), "the endpoint rejects every token");
        tokio::time::advance(MIN_REJECTION_INTERVAL).await;
        fixture.source.reject(&second);
        assert_eq!(fixture.text(Ok(3600)).await.as_deref(), Ok("3"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_without_a_lifetime_is_used_once() {
        let fixture = Fixture::new();
        assert_eq!(fixture.text(Ok(0)).await.as_deref(), Ok("1"));
        assert_eq!(fixture.text(Ok(0)).await.as_deref(), Ok("2"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_client_has_another_source_and_unused_ones_are_dropped() {
        let cache = TokenCache::default();
        let id = |n: u8| ObjectId::from_bytes([n; 12]);
        let first = cache.source(id(0), &client("a"));
        assert!(Arc::ptr_eq(&first, &cache.source(id(0), &client("a"))));
        assert!(!Arc::ptr_eq(&first, &cache.source(id(0), &client("b"))));
        for n in 1..=u8::try_from(3 * MIN_SWEEP).unwrap() {
            cache.source(id(n), &client("a"));
        }
        assert!(lock(&cache.0).by_callback.len() <= MIN_SWEEP);
    }
}
