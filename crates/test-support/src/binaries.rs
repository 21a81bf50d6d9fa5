//! The workspace's own programs, built with the profile of the running test.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

static BUILT: Once = Once::new();

/// Selects the binaries and the integration test. With the test, dependencies have the features that tests need: those
/// of `cargo test --workspace`, which has compiled them already. Without it, Cargo would compile a second copy of most
/// of the workspace's crates.
const WORKSPACE: [&str; 4] = ["--workspace", "--bins", "--test", "leadrelay"];

/// The path of one of the workspace's binaries. The first call builds them all, unless [`build`] was called before,
/// with the profile and into the target directory of the running test; Cargo does not hold its lock while tests run.
///
/// `LEADRELAY_PROGRAMS` names a directory with other programs, which are not built: those of a container image
/// (`.ci/image`).
pub fn binary(name: &str) -> PathBuf {
    if let Some(programs) = env::var_os("LEADRELAY_PROGRAMS") {
        return Path::new(&programs).join(name);
    }
    BUILT.call_once(|| cargo_build(&WORKSPACE));
    let path = profile_dir().join(format!("{name}{}", env::consts::EXE_SUFFIX));
    assert!(path.is_file(), "the workspace has no binary {name}: there is no {}", path.display());
    path
}

/// Builds the binaries of these packages only, for a program that needs no others.
pub fn build(packages: &[&str]) {
    assert!(!BUILT.is_completed(), "the workspace's binaries were built already");
    let packages: Vec<_> = packages.iter().flat_map(|package| ["--package", package]).collect();
    BUILT.call_once(|| cargo_build(&[&["--bins"], packages.as_slice()].concat()));
}

/// The directory of this profile's binaries: `target/debug` for a test in `target/debug/deps` and for a program in
/// `target/debug`.
pub(crate) fn profile_dir() -> PathBuf {
    let test = env::current_exe().expect("the path of this program");
    // Only the directory of a profile has Cargo's own records.
    let profile = test.ancestors().find(|dir| dir.join(".fingerprint").is_dir());
    profile.unwrap_or_else(|| panic!("{} is not in a target directory", test.display())).to_owned()
}

fn cargo_build(selection: &[&str]) {
    let profile_dir = profile_dir();
    let (profile, mut target) = (name(&profile_dir), parent(&profile_dir));
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--quiet"]).args(selection).arg("--manifest-path");
    build.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml"));
    // The directory of the profile `dev` is named `debug`.
    build.args(["--profile", if profile == "debug" { "dev" } else { profile }]);
    // With `--target`, the platform's directory is in between; only the target directory itself has the tag.
    if !target.join("CACHEDIR.TAG").exists() && parent(target).join("CACHEDIR.TAG").exists() {
        build.args(["--target", name(target)]);
        target = parent(target);
    }
    build.arg("--target-dir").arg(target);
    // Variables about the package of this test would make Cargo run the build scripts that read them again, and build
    // everything that depends on those.
    let of_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
    for (key, _) in env::vars_os() {
        if of_package.iter().any(|prefix| key.to_string_lossy().starts_with(prefix)) {
            build.env_remove(key);
        }
    }
    let status = build.status().expect("cargo");
    assert!(status.success(), "building the workspace's binaries failed ({status})");
}

fn parent(dir: &Path) -> &Path {
    dir.parent().expect("a target directory above the profile")
}

fn name(dir: &Path) -> &str {
    dir.file_name().and_then(|name| name.to_str()).expect("a profile or platform name")
}
