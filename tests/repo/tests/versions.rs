//! Versions stand once, in the root Cargo.toml, and the field's crates resolve to one each.

use repo_tests::{files, manifest, none, text};
use std::collections::BTreeMap;
use toml::{Table, Value};

/// Crates whose types cross our own interfaces: two versions of one would not meet.
fn is_the_fields(name: &str) -> bool {
    let one = [
        "vm-memory",
        "vmm-sys-util",
        "vfio-bindings",
        "vfio-ioctls",
        "event-manager",
    ];
    one.contains(&name) || name.starts_with("kvm-")
}

/// From the workspace, or a path without a version.
fn is_versionless(value: &Value) -> bool {
    let Some(table) = value.as_table() else {
        return false;
    };
    let has = |key| table.contains_key(key);
    (has("workspace") || has("path")) && !has("version") && !has("git")
}

fn packages(lock: &str) -> Vec<Table> {
    let lock = manifest(lock);
    let packages = lock["package"].as_array().unwrap();
    packages
        .iter()
        .map(|p| p.as_table().unwrap().clone())
        .collect()
}

fn word<'a>(package: &'a Table, key: &str) -> &'a str {
    package.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[test]
fn dependencies_take_their_version_from_the_workspace() {
    let mut findings = Vec::new();
    for file in files().iter().filter(|file| file.ends_with("/Cargo.toml")) {
        let manifest = manifest(file);
        for key in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(key).and_then(Value::as_table) else {
                continue;
            };
            let versioned = table.iter().filter(|(_, value)| !is_versionless(value));
            findings.extend(versioned.map(|(name, _)| format!("{file}: {name}")));
        }
    }
    none(findings, "a version outside of [workspace.dependencies]");
}

#[test]
fn members_take_edition_licence_and_lints_from_the_workspace() {
    let mut findings = Vec::new();
    for file in files().iter().filter(|file| file.ends_with("/Cargo.toml")) {
        let manifest = manifest(file);
        let own_workspace = manifest.contains_key("workspace");
        let package = manifest["package"].as_table().unwrap();
        let inherits = |value: Option<&Value>| {
            value
                .and_then(|v| v.get("workspace"))
                .and_then(Value::as_bool)
                == Some(true)
        };
        for key in ["version", "edition", "rust-version", "license", "publish"] {
            if !own_workspace && !inherits(package.get(key)) {
                findings.push(format!("{file}: package.{key}"));
            }
        }
        if !own_workspace && !inherits(manifest.get("lints")) {
            findings.push(format!("{file}: lints"));
        }
    }
    none(findings, "not taken from the workspace");
}

#[test]
fn the_fields_crates_resolve_to_one_version_each() {
    for lock in files().iter().filter(|file| file.ends_with("Cargo.lock")) {
        let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for package in packages(lock) {
            if is_the_fields(word(&package, "name")) {
                let of = versions
                    .entry(word(&package, "name").to_owned())
                    .or_default();
                of.push(word(&package, "version").to_owned());
            }
        }
        let twice = versions.iter().filter(|(_, versions)| versions.len() > 1);
        none(twice.map(|one| format!("{one:?}")).collect(), lock);
    }
}

#[test]
fn locked_packages_come_from_the_public_registry_by_its_own_name() {
    let mut findings = Vec::new();
    for lock in files().iter().filter(|file| file.ends_with("Cargo.lock")) {
        for package in packages(lock) {
            let source = word(&package, "source");
            if !source.is_empty()
                && source != "registry+https://github.com/rust-lang/crates.io-index"
            {
                findings.push(format!("{lock}: {} from {source}", word(&package, "name")));
            }
        }
        assert!(!text(lock).is_empty());
    }
    none(findings, "packages from elsewhere");
}
