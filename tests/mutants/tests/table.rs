//! The table follows the code: each fault can be planted, and each test that must find it is there.

use mutants::table;
use std::path::{Path, PathBuf};

/// What the table has to hold at least.
const MUTANTS_MIN: usize = 15;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn root() -> PathBuf {
    here().ancestors().nth(2).unwrap().to_owned()
}

#[test]
fn each_fault_stands_once_in_its_file() {
    let mutants = table::read(&here().join("mutants.toml")).unwrap();
    assert!(mutants.len() >= MUTANTS_MIN, "only {}", mutants.len());
    for mutant in mutants {
        let text = std::fs::read_to_string(root().join(&mutant.file)).unwrap();
        mutant.planted(&text).unwrap();
    }
}

/// All sources of the package that a mutant names.
fn sources(folder: &Path, found: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn each_test_that_must_find_a_fault_is_there() {
    let folders = [("sublet", "broker"), ("sim-tests", "tests/sim")];
    for mutant in table::read(&here().join("mutants.toml")).unwrap() {
        let other = folders
            .iter()
            .find(|(package, _)| *package == mutant.package);
        let folder = other.map_or(mutant.package.as_str(), |(_, folder)| folder);
        let mut text = String::new();
        sources(&root().join(folder), &mut text);
        let name = mutant.test.rsplit("::").next().unwrap();
        let heads = ["(", "<"].map(|end| format!("fn {name}{end}"));
        let there = heads.iter().any(|head| text.contains(head));
        assert!(there, "{}: no test {name}", mutant.name);
    }
}

#[test]
fn fault_that_stands_twice_or_nowhere_is_refused() {
    let mutants = table::read(&here().join("mutants.toml")).unwrap();
    let mutant = &mutants[0];
    let twice = format!("{0}\n{0}", mutant.from);
    for text in ["", twice.as_str()] {
        let refused = mutant.planted(text).unwrap_err().to_string();
        assert!(refused.contains("not once"), "{refused}");
    }
}
