//! Sessions: sealed cookies that expire. No replica stores them, so that any replica can serve any session.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderValue, header::COOKIE};
use contract::{
    ObjectId, Timestamp,
    console::{PortalLink, PortalTarget},
    key::{ApiKey, Scope},
    rpc::{CallbackStatus, ListCallbacks},
    secret::Secret,
};
use secrets::api_key;
use serde::{Deserialize, Serialize};
use std::time::Duration;

use crate::{app::App, config::PublicUrl, fault::Fault, login_link::LoginRole, portal_link};

/// How long a session lasts. With a longer age, a stolen cookie is valid longer; with a shorter one, people sign in
/// more often.
const SESSION_AGE: Duration = Duration::from_hours(12);
const PURPOSE: &str = "console session";

/// The content of the cookie, which is sealed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sealed {
    /// The role of the login link that signed in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    login: Option<LoginRole>,
    /// The API key that signed in, or that an operator added to act with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_key: Option<Secret>,
    /// The token of the portal link that was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    portal: Option<Secret>,
    form_token: String,
    ends_at: Timestamp,
}

/// A signed-in visitor.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) role: Role,
    /// A form that the console rendered for this session contains it; a form of another site cannot.
    pub(crate) form_token: String,
    pub(crate) ends_at: Timestamp,
    /// The API key that actions use.
    pub(crate) credential: Option<Credential>,
}

/// An API key and its text.
#[derive(Debug, Clone)]
pub(crate) struct Credential {
    key: Arc<ApiKey>,
    secret: Secret,
}

/// What a visitor may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// Every project.
    Operator,
    /// Every project, without any action.
    Viewer,
    /// The project of an API key, as far as the key's scopes go.
    Key(Arc<ApiKey>),
    /// One process or callback. [`Visit::portal`](crate::visit::Visit::portal) opens the pages of portal links.
    Portal(Arc<Portal>),
}

/// What a portal link shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Portal {
    pub(crate) project_id: ObjectId,
    pub(crate) target: PortalTarget,
    pub(crate) may_act: bool,
    /// Names the link in logs; does not open it.
    pub(crate) name: String,
}

impl Portal {
    fn new(link: &PortalLink, token: &str) -> Self {
        let name = portal_link::id(token);
        Self { project_id: link.project_id, target: link.target, may_act: link.sealed_key.is_some(), name }
    }

    /// Whether the link shows a callback of its project.
    pub(crate) fn shows(&self, callback: &CallbackStatus) -> bool {
        match self.target {
            PortalTarget::ProcessId(id) => callback.process_id == Some(id),
            PortalTarget::CallbackId(id) => callback.callback_id == id,
        }
    }

    /// The query for the callbacks of its project.
    pub(crate) const fn list_callbacks(&self) -> ListCallbacks {
        ListCallbacks { project_id: self.project_id, details: true }
    }

    /// For visitors who may not act, the pages of actions do not exist.
    fn check_action(&self) -> Result<(), Fault> {
        if self.may_act { Ok(()) } else { Err(Fault::no_page()) }
    }
}

impl Role {
    /// Equal for visitors who see the same pages.
    pub(crate) fn identity(&self) -> String {
        match self {
            Self::Operator => "operator".to_owned(),
            Self::Viewer => "viewer".to_owned(),
            Self::Key(key) => format!("key {}", key.key_id),
            Self::Portal(portal) => format!("portal link {}", portal.name),
        }
    }

    /// Whether the visitor sees every project, and the system.
    pub(crate) fn sees_all(&self) -> bool {
        matches!(self, Self::Operator | Self::Viewer)
    }

    /// Fails unless the visitor may read pages that need this scope in this project.
    pub(crate) fn check(&self, project_id: ObjectId, scope: Scope) -> Result<(), Fault> {
        match self {
            Self::Operator | Self::Viewer => Ok(()),
            // Another project does not exist for the visitor.
            Self::Key(key) if key.project_id != project_id => Err(Fault::no_page()),
            Self::Key(key) if !key.scopes.contains(&scope) => Err(Fault::MissingScope(scope)),
            Self::Key(_) => Ok(()),
            // The pages of portal links check what the link shows; no other page exists for their visitors.
            Self::Portal(_) => Err(Fault::no_page()),
        }
    }
}

impl Sealed {
    /// The content of the request's cookie, unless the session is over.
    fn of(app: &App, headers: &HeaderMap, now: Timestamp) -> Option<Self> {
        let name = cookie_name(&app.public);
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut pairs = cookies.flat_map(|cookies| cookies.split(';')).filter_map(|pair| pair.trim().split_once('='));
        let (_, token) = pairs.find(|(known, _)| *known == name)?;
        let clear = app.session_key.open(PURPOSE, token)?;
        serde_json::from_slice(&clear).ok().filter(|sealed: &Self| now < sealed.ends_at)
    }
}

impl Session {
    /// The session of a request, if it has a valid one. Fails if the portal link of the session has ended or cannot be
    /// read: its visitor has no API key to sign in with.
    pub(crate) async fn of(app: &App, headers: &HeaderMap, now: Timestamp) -> Result<Option<Self>, Fault> {
        let Some(sealed) = Sealed::of(app, headers, now) else { return Ok(None) };
        match &sealed.portal {
            Some(token) => Self::of_portal(app, token.expose(), sealed.form_token, now).await.map(Some),
            None => Ok(Self::of_login(app, sealed, now)),
        }
    }

    fn of_login(app: &App, sealed: Sealed, now: Timestamp) -> Option<Self> {
        let credential =
            sealed.api_key.and_then(|secret| Some(Credential { key: valid_key(app, &secret, now)?, secret }));
        let role = match (sealed.login, &credential) {
            (Some(LoginRole::Operator), _) => Role::Operator,
            (Some(LoginRole::Viewer), _) => Role::Viewer,
            (None, Some(credential)) => Role::Key(credential.key.clone()),
            (None, None) => return None,
        };
        Some(Self { role, form_token: sealed.form_token, ends_at: sealed.ends_at, credential })
    }

    /// The session of a portal link that was not revoked, and whose API key is valid.
    async fn of_portal(app: &App, token: &str, form_token: String, now: Timestamp) -> Result<Self, Fault> {
        let link = portal_link::find(app, token, now).await?;
        let secret = portal_link::open_key(token, &link);
        let credential = secret.and_then(|secret| Some(Credential { key: valid_key(app, &secret, now)?, secret }));
        let role = Role::Portal(Arc::new(Portal::new(&link, token)));
        Ok(Self { role, form_token, ends_at: link.ends_at, credential })
    }

    /// Refuses visitors who may not act. Every action makes this check.
    pub(crate) fn check_action(&self) -> Result<(), Fault> {
        match &self.role {
            Role::Operator | Role::Key(_) => Ok(()),
            Role::Viewer => Err(Fault::Refused(
                "Viewers cannot make changes. Sign in as an operator (leadctl console token), or with an API key."
                    .into(),
            )),
            Role::Portal(portal) => portal.check_action(),
        }
    }

    /// Whether pages offer actions.
    pub(crate) fn may_act(&self) -> bool {
        self.check_action().is_ok()
    }

    /// The text of the session's API key, for actions that need this scope in this project.
    pub(crate) fn credential(&self, project_id: ObjectId, scope: Scope) -> Result<&Secret, Fault> {
        let allows = |key: &ApiKey| key.project_id == project_id && key.scopes.contains(&scope);
        self.credential
            .as_ref()
            .filter(|credential| allows(&credential.key))
            .map(|credential| &credential.secret)
            .ok_or_else(|| {
                Fault::Refused(format!(
                    "This action needs an API key of this project with the scope {}.",
                    scope.as_str()
                ))
            })
    }

    /// Identifies the visitor for the limit of pages. All keys of a project share one limit, so that more keys or
    /// sessions do not raise it. All portal links of a project share another limit, so that their visitors do not use
    /// up the project's own.
    pub(crate) fn visitor(&self) -> String {
        match &self.role {
            Role::Operator => format!("operator {}", self.form_token),
            Role::Viewer => format!("viewer {}", self.form_token),
            Role::Key(key) => format!("project {}", key.project_id),
            Role::Portal(portal) => format!("portal links of {}", portal.project_id),
        }
    }

    /// Identifies the holder of streams for their limit. The keys and the portal links of a project share one limit, so
    /// that the project leaves half of all streams to others.
    pub(crate) fn stream_holder(&self) -> String {
        match &self.role {
            Role::Portal(portal) => format!("project {}", portal.project_id),
            Role::Operator | Role::Viewer | Role::Key(_) => self.visitor(),
        }
    }

    /// The visitor for the log, with the id of the key: keys of one project may have the same name.
    pub(crate) fn identity(&self) -> String {
        match &self.credential {
            Some(credential) => format!("{} {}", self.name(), credential.key.key_id),
            None => self.name(),
        }
    }

    /// The visitor, for people.
    pub(crate) fn name(&self) -> String {
        match (&self.role, &self.credential) {
            (Role::Operator, Some(credential)) => format!("operator with key {}", credential.key.name),
            (Role::Operator, None) => "operator".to_owned(),
            (Role::Viewer, _) => "viewer".to_owned(),
            (Role::Key(key), _) => format!("key {}", key.name),
            (Role::Portal(portal), _) => format!("portal link {}", portal.name),
        }
    }
}

/// The key with this text, if the gateway accepts it.
pub(crate) fn valid_key(app: &App, key: &Secret, now: Timestamp) -> Option<Arc<ApiKey>> {
    app.keys.get(&api_key::hash(key.expose())).filter(|key| key.is_valid(now))
}

/// The cookie of a new session.
pub(crate) fn new_cookie(app: &App, role: SignedIn<'_>, now: Timestamp) -> HeaderValue {
    let form_token = hex::encode(rand::random::<[u8; 16]>());
    let sealed = Sealed { login: None, api_key: None, portal: None, form_token, ends_at: now.plus(SESSION_AGE) };
    let sealed = match role {
        SignedIn::Link(role) => Sealed { login: Some(role), ..sealed },
        SignedIn::Key(secret) => Sealed { api_key: Some(secret), ..sealed },
        // Adding a key does not extend the operator's session.
        SignedIn::OperatorWith(secret, session) => {
            let login = Some(LoginRole::Operator);
            Sealed { login, api_key: Some(secret), ends_at: session.ends_at, ..sealed }
        }
        SignedIn::Portal(token) => Sealed { portal: Some(token), ..sealed },
    };
    // A struct of texts and numbers is always written.
    let clear = serde_json::to_vec(&sealed).unwrap_or_default();
    cookie(&app.public, &app.session_key.seal(PURPOSE, rand::random(), &clear), SESSION_AGE)
}

/// How a session begins.
pub(crate) enum SignedIn<'a> {
    /// With a one-time link.
    Link(LoginRole),
    Key(Secret),
    /// With the token of a portal link.
    Portal(Secret),
    /// The operator of this session adds a key to act with.
    OperatorWith(Secret, &'a Session),
}

/// The cookie that ends a session.
pub(crate) fn no_cookie(app: &App) -> HeaderValue {
    cookie(&app.public, "", Duration::ZERO)
}

fn cookie_name(public: &PublicUrl) -> &'static str {
    // Browsers accept the prefix over TLS only.
    if public.is_https { "__Host-leadrelay" } else { "leadrelay" }
}

fn cookie(public: &PublicUrl, token: &str, age: Duration) -> HeaderValue {
    let secure = if public.is_https { "; Secure" } else { "" };
    let (name, age) = (cookie_name(public), age.as_secs());
    let text = format!("{name}={token}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict{secure}");
    // The token is base64url.
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::OnceLock;

    use secrets::{TokenKey, new_sealing_key};
    use service_kit::kv::BucketCache;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::gateway::Gateway;

    pub(crate) const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);

    pub(crate) fn key() -> ApiKey {
        ApiKey {
            key_id: ObjectId::from_bytes([0xaa; 12]),
            project_id: PROJECT,
            name: "crm".into(),
            scopes: [Scope::LeadsRead].into(),
            created_at: Timestamp::from_millis(0),
            expires_at: None,
            revoked_at: None,
            last_used_at: None,
        }
    }

    fn app(is_https: bool, key: ApiKey) -> App {
        App {
            keys: BucketCache::from_iter([(api_key::hash("lr_1"), key)]),
            broker: OnceLock::new(),
            session_key: TokenKey::parse(&new_sealing_key([1; 32])).unwrap(),
            public: PublicUrl { origin: "https://console.example".into(), is_https },
            gateway: Gateway::new("http://gateway").unwrap(),
            live: Arc::default(),
            visit_rate: Default::default(),
            shutdown: CancellationToken::new(),
        }
    }

    fn headers(cookie: &HeaderValue) -> HeaderMap {
        let cookie = cookie.to_str().unwrap().split_once(';').unwrap().0;
        HeaderMap::from_iter([(COOKIE, format!("other=1; {cookie}").parse().unwrap())])
    }

    #[tokio::test]
    async fn a_session_ends_at_its_time_and_with_its_key() {
        let now = Timestamp::from_millis(1_000_000);
        let app = app(true, key());
        let cookie = new_cookie(&app, SignedIn::Key("lr_1".into()), now);

        assert!(cookie.to_str().unwrap().ends_with("; Path=/; Max-Age=43200; HttpOnly; SameSite=Strict; Secure"));
        assert!(cookie.to_str().unwrap().starts_with("__Host-leadrelay="));
        assert_eq!(Session::of(&app, &headers(&cookie), now).await.unwrap().unwrap().role, Role::Key(Arc::new(key())));
        assert!(Session::of(&app, &headers(&cookie), now.plus(SESSION_AGE)).await.unwrap().is_none());
        assert!(Session::of(&app, &headers(&no_cookie(&app)), now).await.unwrap().is_none());
        let unknown = new_cookie(&app, SignedIn::Key("lr_2".into()), now);
        assert!(Session::of(&app, &headers(&unknown), now).await.unwrap().is_none());
        let revoked = ApiKey { revoked_at: Some(now), ..key() };
        assert!(Session::of(&super::tests::app(true, revoked), &headers(&cookie), now).await.unwrap().is_none());
        let operator = new_cookie(&app, SignedIn::Link(LoginRole::Operator), now);
        assert_eq!(Session::of(&app, &headers(&operator), now).await.unwrap().unwrap().role, Role::Operator);
    }

    #[tokio::test]
    async fn a_viewer_sees_every_project_and_does_not_act() {
        let now = Timestamp::from_millis(1_000_000);
        let app = app(true, key());
        let cookie = new_cookie(&app, SignedIn::Link(LoginRole::Viewer), now);

        let session = Session::of(&app, &headers(&cookie), now).await.unwrap().unwrap();

        assert_eq!((session.role.clone(), session.name()), (Role::Viewer, "viewer".into()));
        assert_eq!(session.role.check(ObjectId::from_bytes([0x22; 12]), Scope::ConfigRead), Ok(()));
        assert!(session.role.sees_all() && session.credential(PROJECT, Scope::LeadsRead).is_err());
        assert!(matches!(session.check_action(), Err(Fault::Refused(_))) && !session.may_act());
    }

    #[tokio::test]
    async fn an_operator_acts_with_an_added_key_until_the_operators_session_ends() {
        let now = Timestamp::from_millis(1_000_000);
        let app = app(true, key());
        let session = Session::of(&app, &headers(&new_cookie(&app, SignedIn::Link(LoginRole::Operator), now)), now)
            .await
            .unwrap()
            .unwrap();
        assert!(session.credential(PROJECT, Scope::LeadsRead).is_err());

        let later = now.plus(SESSION_AGE / 2);
        let cookie = new_cookie(&app, SignedIn::OperatorWith("lr_1".into(), &session), later);

        let session = Session::of(&app, &headers(&cookie), later).await.unwrap().unwrap();
        assert_eq!((session.role.clone(), session.name()), (Role::Operator, "operator with key crm".into()));
        assert_eq!(session.credential(PROJECT, Scope::LeadsRead).unwrap().expose(), "lr_1");
        assert!(session.credential(PROJECT, Scope::LeadsWrite).is_err(), "another scope");
        assert!(session.credential(ObjectId::from_bytes([0x22; 12]), Scope::LeadsRead).is_err(), "another project");
        assert!(Session::of(&app, &headers(&cookie), now.plus(SESSION_AGE)).await.unwrap().is_none());
    }

    #[test]
    fn the_streams_of_a_projects_keys_and_portal_links_have_one_holder() {
        let target = PortalTarget::CallbackId(ObjectId::from_bytes([0x22; 12]));
        let portal = Portal { project_id: PROJECT, target, may_act: false, name: "0".into() };
        let [of_key, of_portal] = [Role::Key(Arc::new(key())), Role::Portal(Arc::new(portal))].map(|role| Session {
            role,
            form_token: "f0".into(),
            ends_at: Timestamp::from_millis(0),
            credential: None,
        });

        assert_eq!(of_key.stream_holder(), of_portal.stream_holder());
        assert_ne!(of_key.visitor(), of_portal.visitor());
    }

    #[test]
    fn a_plain_listener_has_a_cookie_without_the_prefix() {
        let cookie = new_cookie(&app(false, key()), SignedIn::Link(LoginRole::Operator), Timestamp::from_millis(0));
        let text = cookie.to_str().unwrap();
        assert!(text.starts_with("leadrelay=") && text.ends_with("SameSite=Strict"), "{text}");
    }

    #[test]
    fn a_key_sees_its_project_as_far_as_its_scopes_go() {
        let role = Role::Key(Arc::new(key()));
        let other = ObjectId::from_bytes([0x22; 12]);

        assert_eq!(role.check(PROJECT, Scope::LeadsRead), Ok(()));
        assert_eq!(role.check(PROJECT, Scope::ConfigRead), Err(Fault::MissingScope(Scope::ConfigRead)));
        assert_eq!(role.check(other, Scope::LeadsRead), Err(Fault::no_page()));
        assert_eq!(Role::Operator.check(other, Scope::ConfigRead), Ok(()));
        let target = PortalTarget::CallbackId(other);
        let portal = Portal { project_id: PROJECT, target, may_act: true, name: "0".into() };
        assert_eq!(Role::Portal(Arc::new(portal)).check(PROJECT, Scope::LeadsRead), Err(Fault::no_page()));
    }
}
