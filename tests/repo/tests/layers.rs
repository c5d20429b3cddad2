//! Who may import whom: broker -> vmm-glue -> vfio-shim, and the lab's NTB model nobody.

use repo_tests::{files, manifest, none, sources, text};

/// Each package with the packages of this workspace that it may depend on.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("broker", &["vfio-shim", "vmm-glue", "bench-report"]),
    ("vmm-glue", &["vfio-shim", "bench-report"]),
    ("vfio-shim", &["bench-report"]),
    ("tests/bench", &[]),
    ("tests/kvm", &["vfio-shim", "vmm-glue"]),
    ("tests/mutants", &[]),
    ("tests/repo", &[]),
    ("tests/lab/model", &[]),
    ("tests/lab/agent", &[]),
    ("tests/lab/contracts", &["vfio-shim"]),
    ("tests/lab/runner", &["lab-agent"]),
    ("tests/fuzz", &["sublet", "vfio-shim", "vmm-glue"]),
    ("tests/fuzz/libfuzzer", &["fuzz-targets"]),
    ("tests/sim", &["sublet", "vfio-shim", "vmm-glue"]),
];

const DEPENDENCIES: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

fn package_name(folder: &str) -> String {
    let manifest = manifest(&format!("{folder}/Cargo.toml"));
    manifest["package"]["name"].as_str().unwrap().to_owned()
}

fn dependencies(folder: &str) -> Vec<String> {
    let manifest = manifest(&format!("{folder}/Cargo.toml"));
    let tables = DEPENDENCIES
        .iter()
        .filter_map(|key| manifest.get(*key)?.as_table());
    tables.flat_map(|table| table.keys().cloned()).collect()
}

#[test]
fn every_package_stands_in_the_table_of_layers() {
    let mut found: Vec<String> = files();
    found.retain(|file| file.ends_with("/Cargo.toml"));
    let mut known: Vec<String> = (MAY_IMPORT.iter())
        .map(|(folder, _)| format!("{folder}/Cargo.toml"))
        .collect();
    known.sort();
    assert_eq!(found, known);
}

#[test]
fn packages_depend_only_on_layers_below_them() {
    let ours: Vec<String> = MAY_IMPORT
        .iter()
        .map(|(folder, _)| package_name(folder))
        .collect();
    let mut findings = Vec::new();
    for (folder, allowed) in MAY_IMPORT {
        for dependency in dependencies(folder) {
            if ours.contains(&dependency) && !allowed.contains(&dependency.as_str()) {
                findings.push(format!("{folder} depends on {dependency}"));
            }
        }
    }
    none(findings, "imports against the layers");
}

#[test]
fn vmm_glue_knows_only_the_model_of_vfio_shim() {
    let mut findings = Vec::new();
    for file in sources() {
        if !file.starts_with("vmm-glue/src/") {
            continue;
        }
        for (number, line) in text(&file).lines().enumerate() {
            let mut pieces = line.split("vfio_shim").skip(1);
            if pieces.any(|after| !after.starts_with("::model")) {
                findings.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none(
        findings,
        "vmm-glue uses more of vfio-shim than `vfio_shim::model`",
    );
}

#[test]
fn the_ntb_model_names_nothing_of_the_product() {
    let mut findings = Vec::new();
    for file in sources() {
        if !file.starts_with("tests/lab/model/") {
            continue;
        }
        let text = text(&file);
        for name in [
            "vfio_shim",
            "vmm_glue",
            "sublet::",
            "include!",
            "../../../vfio-shim",
        ] {
            if text.contains(name) {
                findings.push(format!("{file} names {name}"));
            }
        }
    }
    none(
        findings,
        "the NTB model must be independent of what it tests",
    );
}

#[test]
fn anyhow_is_only_in_mains_and_in_what_tests() {
    let mut findings = Vec::new();
    for file in sources() {
        let product = ["broker/src/", "vmm-glue/src/", "vfio-shim/src/"];
        let library =
            product.iter().any(|folder| file.starts_with(folder)) && !file.ends_with("main.rs");
        if library && text(&file).contains("anyhow") {
            findings.push(file);
        }
    }
    none(findings, "anyhow in a library");
}

#[test]
fn the_broker_forbids_unsafe() {
    for file in ["broker/src/lib.rs", "broker/src/main.rs"] {
        assert!(text(file).contains("#![forbid(unsafe_code)]"), "{file}");
    }
}
