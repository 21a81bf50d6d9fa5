# Common commands; `just` lists them. `just` is optional: you can run the lines of a recipe without it.

_default:
    @just --list

# Start the whole system on this machine, with a demo
up *arguments="--demo":
    cargo run --release -- up {{arguments}}

# Run all tests with the installed nats-server; see also test-current
test *arguments:
    cargo test --workspace {{arguments}}

# Measure memory with a million deliveries, commands and audited updates; BACKLOG=100000 is faster
memory:
    cargo test --profile dist --workspace --test leadrelay backlog -- --ignored --nocapture --test-threads 1

# Hold 100 000 events for paused callbacks, resume them, and deliver all to a new callback; EVENTS=10000 is faster
backfill:
    LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo test --workspace --test leadrelay a_hundred_thousand_events -- --ignored --nocapture

# Import 100 000 rows with leadctl and measure its memory; IMPORT_ROWS=1000000 takes longer
import:
    cargo test --workspace --test leadrelay a_hundred_thousand_rows -- --ignored --nocapture

# Run all tests on a current nats-server instead of the installed one
test-current *arguments:
    LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo test --workspace {{arguments}}

# Check licenses, bans, sources and advisories of the dependencies
deny:
    .ci/deny

# Check the manifests and the Helm chart in deploy/ without a cluster; --write first regenerates the chart's templates
deploy *arguments:
    .ci/deploy {{arguments}}

# Write the software bill of materials (CycloneDX) of the programs
sbom *file:
    .ci/sbom {{file}}

# Test the published contracts with clients in Python and JavaScript, the Standard Webhooks library, and schemathesis
interop:
    .ci/interop

# Open every page of the console in Chromium; --screenshots docs/images/ writes the screenshots of the README
console *arguments:
    .ci/console {{arguments}}

# Regenerate proto-schemas/ from the code
schemas:
    UPDATE_SCHEMAS=1 cargo test --workspace --lib schema

# Build the container image leadrelay:0.1.0
image:
    .ci/image

# Start the whole system in a new kind cluster on this machine
kind: image
    kind create cluster --name leadrelay
    kind load docker-image leadrelay:0.1.0 --name leadrelay
    kubectl apply -f deploy/kubernetes/namespace.yaml
    kubectl apply -k deploy/kubernetes/overlays/local
    kubectl -n leadrelay wait --for=condition=Available deployment --all --timeout=5m

# Measure performance against floors of the same run, for over 20 minutes on an idle machine; --json FILE keeps results
bench *arguments="all":
    LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo run --profile dist -p bench -- {{arguments}}

# Measure for two minutes; fails if the ratio to a floor is lower than noise explains
perf-smoke:
    cargo run --release -p bench -- smoke

# Check formatting, lints, language, structure and links
lint:
    cargo fmt --check
    .ci/words
    .ci/structure
    .ci/links
    cargo clippy --workspace --all-targets -- -D warnings

# Regenerate .sqlx from the migrations; --check only compares
sqlx *arguments:
    .ci/sqlx {{arguments}}

# Run everything that must pass before a merge
ci:
    .ci/run

# Inject faults under load for some minutes; the seed determines their order; prints a table
faults minutes="10" seed="1":
    FAULTS_MINUTES={{minutes}} FAULTS_SEED={{seed}} cargo test --workspace --test leadrelay faults::for_minutes -- --ignored --nocapture

# Inject faults into a cluster of three nats-servers for some minutes; the seed determines their order; prints a table
faults-cluster minutes="10" seed="1":
    FAULTS_MINUTES={{minutes}} FAULTS_SEED={{seed}} LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo test --workspace --test leadrelay cluster::nats::for_minutes -- --ignored --nocapture

# Upgrade from an earlier commit under load: builds its programs, and replaces its services one after the other
upgrade commit:
    .ci/upgrade {{commit}}

# Kill the primary of a Postgres under Patroni twice; needs the packages patroni and etcd-server
patroni:
    LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo test --workspace --test leadrelay cluster::patroni -- --ignored --nocapture

# Measure a healthy tenant's latency during all attacks, or those whose names contain a text; prints a table
hostile attack="":
    HOSTILE_ATTACK="{{attack}}" LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo test --profile dist --workspace --test leadrelay hostile::a_healthy_tenant_is_not_delayed -- --ignored --nocapture

# Break all guarantees on purpose, or those whose patch names begin with NAMES; expects a test to fail for each
mutations *names:
    tests/mutations/run {{names}}
