//! What the documents say of the code is true: the map, the files with unsafe, the wire's hash.
//!
//! `SUBLET_BLESS=1 cargo test -p repo-tests --test documents` writes the map and the list anew; the
//! reasons beside files with unsafe, and the protocol's page, are for a person to write.

use repo_tests::{none, root, sources, text};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, env, fs};

const PAGE: &str = "ARCHITECTURE.md";
/// The layouts, and the payloads of the messages.
const WIRE: [&str; 2] = ["vfio-shim/src/path/wire.rs", "vfio-shim/src/path/codec.rs"];
const PROTOCOL: &str = "vfio-shim/PROTOCOL.md";

/// The lines of a list between its marks, as file and what is said of it.
fn listed(page: &str, name: &str) -> BTreeMap<String, String> {
    let (start, end) = marks(name);
    let section = page
        .split_once(&start)
        .and_then(|(_, rest)| rest.split_once(&end));
    let (section, _) = section.unwrap_or_else(|| panic!("{PAGE} lacks its list of {name}"));
    let lines = section.lines().filter_map(|line| line.strip_prefix("- `"));
    lines
        .map(|line| {
            line.split_once("`: ")
                .unwrap_or_else(|| panic!("{PAGE}: `{line}`"))
        })
        .map(|(file, said)| (file.to_owned(), said.to_owned()))
        .collect()
}

fn marks(name: &str) -> (String, String) {
    (
        format!("<!-- {name} -->"),
        format!("<!-- end of {name} -->"),
    )
}

/// Each source with the sentence of its first line.
fn purposes() -> BTreeMap<String, String> {
    let purpose = |file: String| {
        let first = text(&file).lines().next().unwrap_or_default().to_owned();
        let sentence = first.trim_start_matches("//!").trim().to_owned();
        (file, sentence)
    };
    sources().into_iter().map(purpose).collect()
}

fn differences(said: &BTreeMap<String, String>, is: &BTreeMap<String, String>) -> Vec<String> {
    let missing = is
        .iter()
        .filter(|(file, purpose)| said.get(*file) != Some(*purpose));
    let mut findings: Vec<String> = missing.map(|(f, p)| format!("add `{f}`: {p}")).collect();
    let gone = said.keys().filter(|file| !is.contains_key(*file));
    findings.extend(gone.map(|file| format!("remove `{file}`")));
    findings
}

/// The map by folder, as the page shows it.
fn map(purposes: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut folder = "";
    for (file, purpose) in purposes {
        let (of, _) = file.rsplit_once('/').unwrap_or(("", file));
        if of != folder {
            folder = of;
            out.push_str(&format!("\n**{folder}**\n\n"));
        }
        out.push_str(&format!("- `{file}`: {purpose}\n"));
    }
    out
}

#[test]
fn the_map_tells_every_file_with_its_own_first_sentence() {
    let page = text(PAGE);
    let is = purposes();
    if env::var_os("SUBLET_BLESS").is_some() {
        let (start, end) = marks("map");
        let (before, rest) = page.split_once(&start).expect("the map's first mark");
        let (_, after) = rest.split_once(&end).expect("the map's second mark");
        let page = format!("{before}{start}\n{}\n{end}{after}", map(&is));
        fs::write(root().join(PAGE), page).unwrap();
        return;
    }
    none(
        differences(&listed(&page, "map"), &is),
        "the map is not what is there",
    );
}

#[test]
fn files_with_unsafe_are_those_of_the_list_each_with_a_reason() {
    let opts_in = |file: &String| {
        let text = text(file);
        ["allow", "expect"]
            .iter()
            .any(|level| text.contains(&format!("{level}(unsafe_code")))
    };
    let is: Vec<String> = sources().into_iter().filter(opts_in).collect();
    let said = listed(&text(PAGE), "unsafe");
    let listed: Vec<String> = said.keys().cloned().collect();
    assert_eq!(
        listed, is,
        "the list of files with unsafe (left) is not what is there (right)"
    );
    let short = said.iter().filter(|(_, reason)| reason.len() < 12);
    none(
        short.map(|(file, _)| file.clone()).collect(),
        "no reason given",
    );
}

#[test]
fn the_protocols_page_knows_the_wire_it_describes() {
    let mut digest = Sha256::new();
    WIRE.iter().for_each(|file| digest.update(text(file)));
    let hash: String = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let page = text(PROTOCOL);
    let last = page.trim_end().lines().last().unwrap_or_default();
    assert_eq!(
        last,
        format!("wire.rs, codec.rs sha256: {hash}"),
        "{WIRE:?} have changed: read {PROTOCOL} against them, then make this its last line"
    );
}
