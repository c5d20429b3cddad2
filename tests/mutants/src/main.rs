//! Plants each fault of the table in a copy of the tree and runs the test that has to find it.
//!
//! `mutants [NAME ...]`: all, or those named. A test that is red without any fault finds nothing,
//! so each is run in the clean tree first.

use anyhow::{Context, Result, bail};
use mutants::outcome::{Outcome, TEST, limit, run};
use mutants::table::{self, Mutant};
use mutants::tree::Tree;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

struct Bed {
    tree: Tree,
    target: PathBuf,
    log: PathBuf,
}

impl Bed {
    fn new(root: &Path) -> Result<Self> {
        let folder = root.join("target").join("mutants");
        Ok(Self {
            tree: Tree::copy(root, &folder.join("tree"))?,
            target: folder.join("build"),
            log: folder.join("log"),
        })
    }

    fn outcome(&self, mutant: &Mutant, limit: Duration) -> Result<(Outcome, Duration)> {
        let places = (self.tree.root(), &*self.target, &*self.log);
        run(mutant, places, limit)
    }

    /// Whether the mutant is found; says so in a line.
    fn judge(&self, mutant: &Mutant, (clean, took): (Outcome, Duration)) -> Result<bool> {
        let since = Instant::now();
        let (found, why) = match clean {
            Outcome::Green => {
                let _planted = self.tree.plant(mutant)?;
                match self.outcome(mutant, limit(took))?.0 {
                    Outcome::Red => (true, "red"),
                    Outcome::Hung => (true, "does not end"),
                    Outcome::Green => (false, "stays green: nobody would notice"),
                    Outcome::NotBuilt => (false, "does not compile with the fault"),
                    Outcome::NoTest => (false, "is not there with the fault"),
                }
            }
            Outcome::NotBuilt => (false, "does not compile without any fault"),
            Outcome::NoTest => (false, "is not there: the table names another"),
            Outcome::Red | Outcome::Hung => (false, "is red without any fault"),
        };
        let word = if found { "ok  " } else { "FAIL" };
        let seconds = since.elapsed().as_secs();
        println!(
            "{word} {}: {} {why} ({seconds} s)",
            mutant.name, mutant.test
        );
        if !found && clean == Outcome::Green {
            let text = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(30)..];
            tail.iter().for_each(|line| println!("    {line}"));
        }
        Ok(found)
    }
}

fn chosen(all: Vec<Mutant>, names: &[String]) -> Result<Vec<Mutant>> {
    if names.is_empty() {
        return Ok(all);
    }
    let find = |name: &String| {
        let found = all.iter().find(|mutant| mutant.name == *name).cloned();
        found
            .with_context(|| format!("no mutant is named `{name}`: see tests/mutants/mutants.toml"))
    };
    names.iter().map(find).collect()
}

fn main() -> Result<ExitCode> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(root) = here.ancestors().nth(2) else {
        bail!("{} is not in the repository", here.display());
    };
    let mutants = chosen(table::read(&here.join("mutants.toml"))?, &names)?;
    let bed = Bed::new(root)?;
    let mut clean = BTreeMap::new();
    for mutant in &mutants {
        let key = |m: &Mutant| (m.package.clone(), m.target.clone(), m.test.clone());
        if let std::collections::btree_map::Entry::Vacant(entry) = clean.entry(key(mutant)) {
            entry.insert(bed.outcome(mutant, TEST)?);
        }
    }
    let (mut found, mut missed) = (0, 0);
    for mutant in &mutants {
        let key = (
            mutant.package.clone(),
            mutant.target.clone(),
            mutant.test.clone(),
        );
        match bed.judge(mutant, clean[&key])? {
            true => found += 1,
            false => missed += 1,
        }
    }
    println!("{found} passed, {missed} failed");
    Ok(if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
