//! An upgrade from an earlier version under load, in the order of docs/operations/upgrades.md: two of each service are
//! replaced one after the other, while clients and producers send. The checks at the end are those of the fault suite:
//! nothing is lost, nothing is applied twice, and the audit is clean.

use std::path::{Path, PathBuf};

use rand::{SeedableRng, rngs::StdRng};
use test_support::{LocalNats, LocalPostgres, Service, binary, free_port, nats, postgres};

use crate::{
    faults::{
        ANSWER_WITHIN, retry_schedule,
        scene::{Scene, Servers},
    },
    support::{TEST_TIMEOUT, service_of},
};

/// The services, readers before writers.
const ORDER: [&str; 3] = ["lead-state", "webhook-notifier", "gateway"];

/// One of two processes of a service.
struct Member {
    name: &'static str,
    /// The address of the HTTP API, if the service is a gateway.
    listen: Option<String>,
    service: Service,
}

impl Member {
    async fn start(program: &Path, name: &'static str, listen: Option<String>, servers: &Installed) -> Self {
        let schedule = retry_schedule();
        let mut extra = vec![("RETRY_SCHEDULE", schedule.as_str())];
        extra.extend(listen.as_deref().map(|listen| ("GATEWAY_LISTEN", listen)));
        let (mut service, ready) = service_of(program, name, &servers.nats, &servers.postgres, &extra);
        service.wait_for_http(&ready, TEST_TIMEOUT).await;
        Self { name, listen, service }
    }
}

/// The servers of the installation.
struct Installed {
    nats: LocalNats,
    postgres: LocalPostgres,
}

/// Run by `just upgrade COMMIT`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the programs of an earlier version: just upgrade COMMIT"]
async fn an_upgrade_under_load_loses_nothing() {
    let earlier = std::env::var_os("UPGRADE_FROM").expect("UPGRADE_FROM is not set: use `just upgrade COMMIT`");
    let earlier = PathBuf::from(earlier);
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let installed = Installed { nats, postgres };
    let mut members = Vec::new();
    for name in ORDER {
        for _ in 0..2 {
            let listen = (name == "gateway").then(|| format!("127.0.0.1:{}", free_port()));
            members.push(Member::start(&earlier.join(name), name, listen, &installed).await);
        }
    }
    let gateways = members.iter().filter_map(|member| Some(format!("http://{}", member.listen.as_ref()?)));
    let servers = Servers {
        nats_url: installed.nats.url(),
        database_url: installed.postgres.url(),
        gateways: gateways.collect(),
    };
    let mut random = StdRng::seed_from_u64(1);
    let scene = Scene::start(servers, 1, ANSWER_WITHIN).await;
    scene.wait_until_recovered(&mut random).await;
    scene.take_gaps();

    println!("| replaced | longest gap in acceptance | in application | in delivery |\n|---|---|---|---|");
    for member in &mut members {
        assert!(member.service.terminate().await.success(), "{}", member.service.log());
        let (name, listen) = (member.name, member.listen.take());
        *member = Member::start(&binary(name), name, listen, &installed).await;
        scene.wait_until_recovered(&mut random).await;
        println!("| {name} | {} |", scene.take_gaps());
    }

    scene.audit().await;
    println!("\n{}", scene.end().await);
}
