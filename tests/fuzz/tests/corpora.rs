//! The corpora of all fuzz targets, replayed without a fuzzer.

use fuzz_targets::TARGETS;
use std::fs;
use std::path::{Path, PathBuf};

fn folder(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(part)
}

/// The folder of what fuzzers found on this machine, a folder for each target, for `coverage`.
const FOUND: &str = "SUBLET_FUZZ_FOUND";

#[test]
fn every_input_of_every_corpus_keeps_the_promises() {
    for target in TARGETS {
        let corpus = fs::read_dir(folder("corpus").join(target.name));
        let corpus = corpus.unwrap_or_else(|error| panic!("{}: {error}", target.name));
        let mut count = 0;
        for entry in corpus {
            (target.run)(&fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count >= 10, "{}: only {count} inputs", target.name);
    }
}

#[test]
fn what_fuzzers_found_keeps_the_promises() {
    let Some(found) = std::env::var_os(FOUND) else {
        return;
    };
    for target in TARGETS {
        let corpus = Path::new(&found).join(target.name).join("corpus");
        for entry in fs::read_dir(corpus).into_iter().flatten() {
            (target.run)(&fs::read(entry.unwrap().path()).unwrap());
        }
    }
}

#[test]
fn every_target_has_a_binary_for_the_fuzzer_and_covers_what_is_there() {
    for target in TARGETS {
        let binary = folder("libfuzzer/fuzz_targets").join(format!("{}.rs", target.name));
        assert!(binary.is_file(), "{}", binary.display());
        for source in target.covers {
            let source = folder("../..").join(source);
            assert!(source.is_file(), "{}", source.display());
        }
    }
}
