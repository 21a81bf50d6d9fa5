# The common commands; `just` lists them. None is needed: each is one line.

_default:
    @just --list

# The whole system on this machine, with something to look at
up *arguments="--demo":
    cargo run --release -- up {{arguments}}

# All tests
test *arguments:
    cargo test --workspace {{arguments}}

# What the services take with a million deliveries or commands waiting, and an audit of a million updates; BACKLOG=100000 is quicker
memory:
    cargo test --release -p leadrelay-tests backlog -- --ignored --nocapture --test-threads 1

# A file of 100 000 rows through leadctl import, with the memory that it takes; IMPORT_ROWS=1000000 is longer
import:
    cargo test -p leadrelay-tests a_hundred_thousand_rows -- --ignored --nocapture

# All tests on a current nats-server rather than the one installed here
test-current *arguments:
    LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo test --workspace {{arguments}}

# Licenses, bans, sources and advisories of the dependencies
deny:
    .ci/deny

# What is in deploy/, checked without a cluster
deploy:
    .ci/deploy

# Clients in Python and JavaScript, webhooks under their reference library, and the HTTP API against its document
interop:
    .ci/interop

# The JSON Schemas and documents in proto-schemas/, written anew from the code
schemas:
    UPDATE_SCHEMAS=1 cargo test -p contract -p gateway schema

# The container image, leadrelay:0.1.0
image:
    .ci/image

# The whole system in a new cluster of kind on this machine
kind: image
    kind create cluster --name leadrelay
    kind load docker-image leadrelay:0.1.0 --name leadrelay
    kubectl apply -k deploy/kubernetes/overlays/local
    kubectl -n leadrelay wait --for=condition=Available deployment --all --timeout=5m

# How fast it is on this machine, against floors of the same run: about 17 minutes and the build, with nothing else running; --json FILE keeps it
bench *arguments="all":
    LEADRELAY_NATS_SERVER=$(.ci/nats-server) cargo run --release -p bench -- {{arguments}}

# Two minutes of that; fails where a ratio to a floor is lower than noise explains
perf-smoke:
    cargo run --release -p bench -- smoke

# Formatting and lints
lint:
    cargo fmt --check
    cargo clippy --workspace --all-targets -- -D warnings

# What the checked SQL queries know of the database; --check only compares
sqlx *arguments:
    .ci/sqlx {{arguments}}

# Everything that must hold before a merge
ci:
    .ci/run

# Faults for so many minutes, in an order that follows from the seed; prints a table
faults minutes="10" seed="1":
    FAULTS_MINUTES={{minutes}} FAULTS_SEED={{seed}} cargo test -p leadrelay-tests for_minutes -- --ignored --nocapture

# Breaks one guarantee after the other, on purpose, and expects a test to notice
mutations *names:
    tests/mutations/run {{names}}
