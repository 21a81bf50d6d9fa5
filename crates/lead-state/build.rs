//! Rebuilds the crate when a migration is added: `sqlx::migrate!` embeds the folder but does not watch it.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
