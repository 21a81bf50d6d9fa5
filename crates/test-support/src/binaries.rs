//! The workspace's own programs, built as the running test was.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

static BUILT: Once = Once::new();

/// The path of one of the workspace's binaries. The first call builds them all, unless [`build`] did before, with the
/// profile and into the target directory of the running test; Cargo lets go of its lock while tests run.
///
/// # Panics
/// When the build fails, or there is no binary of that name.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    BUILT.call_once(|| cargo_build(&["--workspace"]));
    let path = profile_dir().join(format!("{name}{}", env::consts::EXE_SUFFIX));
    assert!(path.is_file(), "the workspace has no binary {name}: there is no {}", path.display());
    path
}

/// Builds the binaries of these packages, for a program that needs no others.
///
/// # Panics
/// When the build fails, or something was built before.
pub fn build(packages: &[&str]) {
    assert!(!BUILT.is_completed(), "the workspace's binaries were built already");
    let packages: Vec<_> = packages.iter().flat_map(|package| ["--package", package]).collect();
    BUILT.call_once(|| cargo_build(&packages));
}

/// Where the binaries of this profile are: `target/debug` for a test that runs from `target/debug/deps`, and for a program
/// of the workspace itself.
pub(crate) fn profile_dir() -> PathBuf {
    let test = env::current_exe().expect("the path of this program");
    // Cargo's own records are in the directory of the profile, and nowhere else.
    let profile = test.ancestors().find(|dir| dir.join(".fingerprint").is_dir());
    profile.unwrap_or_else(|| panic!("{} is not in a target directory", test.display())).to_owned()
}

fn cargo_build(packages: &[&str]) {
    let profile_dir = profile_dir();
    let (profile, mut target) = (name(&profile_dir), parent(&profile_dir));
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--quiet", "--bins"]).args(packages).arg("--manifest-path");
    build.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml"));
    // The profile `dev` is the one whose directory has another name.
    build.args(["--profile", if profile == "debug" { "dev" } else { profile }]);
    // With `--target`, the platform's name is between; only the target directory itself carries the tag.
    if !target.join("CACHEDIR.TAG").exists() && parent(target).join("CACHEDIR.TAG").exists() {
        build.args(["--target", name(target)]);
        target = parent(target);
    }
    build.arg("--target-dir").arg(target);
    // What Cargo told this test about its own package is no business of the build: build scripts that look at it would
    // run again, and with them all that depends on theirs.
    let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
    for (key, _) in env::vars_os() {
        if told.iter().any(|prefix| key.to_string_lossy().starts_with(prefix)) {
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
