//! The table of planted faults: `mutants.toml`, judged before anything is built.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;

/// One planted fault.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// What the fault is, in a few words.
    pub name: String,
    /// The file it is planted in, relative to the repository's root.
    pub file: String,
    /// What stands there, once.
    pub from: String,
    /// What stands there instead.
    pub to: String,
    /// The package whose test has to find it.
    pub package: String,
    /// `lib`, or the name of an integration test of the package.
    pub target: String,
    /// The test's whole path in its target.
    pub test: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    mutant: Vec<Mutant>,
}

/// Reads the table.
pub fn read(path: &Path) -> Result<Vec<Mutant>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let table: Table = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
    let names: BTreeSet<&str> = table.mutant.iter().map(|m| m.name.as_str()).collect();
    ensure!(names.len() == table.mutant.len(), "two mutants of one name");
    Ok(table.mutant)
}

impl Mutant {
    /// The file's text with the fault in it. `from` must stand there exactly once: a table that
    /// does not follow the code would plant nothing, or something else.
    pub fn planted(&self, text: &str) -> Result<String> {
        let found = text.matches(&self.from).count();
        ensure!(
            found == 1,
            "mutant `{}`: {} holds `from` {found} times, not once",
            self.name,
            self.file
        );
        ensure!(
            self.from != self.to,
            "mutant `{}` changes nothing",
            self.name
        );
        Ok(text.replacen(&self.from, &self.to, 1))
    }
}
