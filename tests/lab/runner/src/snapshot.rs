//! What a host looks like, taken by its agent, and what differs between two times.

use crate::agent::Agent;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// A daemon's own heap may grow a little between two times; its mappings and pins may not.
const RESIDENT_GROWTH_KIB_MAX: u64 = 4096;
const DIFFERENCES_SHOWN_MAX: usize = 20;
/// A daemon at rest opens a file for a moment now and then. What is left is there for longer.
const MOMENT_MAX: Duration = Duration::from_secs(2);

/// One host at one time.
#[derive(Clone, Debug)]
pub struct Snapshot(Value);

impl Snapshot {
    /// Takes it.
    pub fn take(agent: &Agent) -> Result<Self> {
        let text = agent.run(&["lab-agent", "snapshot"])?;
        Ok(Snapshot(
            serde_json::from_str(&text).context("a snapshot that is no JSON")?,
        ))
    }

    /// Adds what cannot be seen from inside.
    pub fn add(&mut self, name: &str, value: Value) {
        self.0[name] = value;
    }

    /// Leaves out the programs whose command line has this word: one was started anew meanwhile.
    fn forget_programs(&mut self, word: &str) {
        if let Some(programs) = self.0["daemons"].as_object_mut() {
            programs.retain(|command, _| !command.contains(word));
        }
        if let Some(commands) = self.0["processes"].as_array_mut() {
            commands.retain(|command| !command.as_str().is_some_and(|text| text.contains(word)));
        }
    }

    /// Fails with every difference.
    pub fn ensure_equal(&self, after: &Snapshot) -> Result<()> {
        let mut differences = Vec::new();
        differ("", &self.0, &after.0, &mut differences);
        let count = differences.len();
        differences.truncate(DIFFERENCES_SHOWN_MAX);
        ensure!(
            count == 0,
            "{count} differences: {}",
            differences.join("; ")
        );
        Ok(())
    }
}

/// Host a and host b at one time.
pub type Both = (Snapshot, Snapshot);

/// Both without the programs that have this word: see [`Snapshot::forget_programs`].
pub fn without_programs((mut a, mut b): Both, word: &str) -> Both {
    a.forget_programs(word);
    b.forget_programs(word);
    (a, b)
}

/// Looks at both hosts until they are as before, for as long as a moment lasts.
pub fn ensure_both_equal(before: &Both, look: impl Fn() -> Result<Both>) -> Result<()> {
    let end = Instant::now() + MOMENT_MAX;
    loop {
        let equal = compare(before, &look()?);
        if equal.is_ok() || Instant::now() >= end {
            return equal;
        }
    }
}

/// Looks at both hosts until two looks in a row are alike: what later ones are compared with.
pub fn both_at_rest(look: impl Fn() -> Result<Both>) -> Result<Both> {
    let end = Instant::now() + MOMENT_MAX;
    let mut last = look()?;
    loop {
        let now = look()?;
        match compare(&last, &now) {
            Ok(()) => return Ok(now),
            Err(error) if Instant::now() >= end => return Err(error.context("never at rest")),
            Err(_) => last = now,
        }
    }
}

fn compare(before: &Both, now: &Both) -> Result<()> {
    before.0.ensure_equal(&now.0).context("host a")?;
    before.1.ensure_equal(&now.1).context("host b")
}

fn differ(path: &str, before: &Value, after: &Value, into: &mut Vec<String>) {
    match (before, after) {
        (Value::Object(one), Value::Object(two)) => {
            for key in one
                .keys()
                .chain(two.keys().filter(|key| !one.contains_key(*key)))
            {
                let at = |map: &serde_json::Map<String, Value>| {
                    map.get(key).cloned().unwrap_or_default()
                };
                differ(&format!("{path}/{key}"), &at(one), &at(two), into);
            }
        }
        (Value::Array(one), Value::Array(two)) => {
            let gone = one
                .iter()
                .filter(|item| !two.contains(item))
                .map(|item| format!("{path} lost {item}"));
            let new = two
                .iter()
                .filter(|item| !one.contains(item))
                .map(|item| format!("{path} gained {item}"));
            let found = into.len();
            into.extend(gone.chain(new));
            if into.len() == found && one.len() != two.len() {
                into.push(format!(
                    "{path} had {} entries, has {}",
                    one.len(),
                    two.len()
                ));
            }
        }
        (Value::Number(one), Value::Number(two)) if path.ends_with("/resident_kib") => {
            let (one, two) = (one.as_u64().unwrap_or(0), two.as_u64().unwrap_or(0));
            if two > one + RESIDENT_GROWTH_KIB_MAX {
                into.push(format!("{path} grew from {one} to {two}"));
            }
        }
        _ if before != after => into.push(format!("{path} was {before}, is {after}")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::{Both, Snapshot, both_at_rest, ensure_both_equal};
    use serde_json::json;
    use std::cell::Cell;

    #[test]
    fn every_kind_of_difference_is_named() {
        let one = Snapshot(json!({"pci": {"a": {"driver": "nvme"}}, "files": ["x", "y"], "n": 1}));
        let two = Snapshot(json!({"pci": {"a": {"driver": null}}, "files": ["x", "z"], "n": 1}));
        let error = one.ensure_equal(&two).unwrap_err().to_string();
        assert_eq!(
            error,
            "3 differences: /files lost \"y\"; /files gained \"z\"; /pci/a/driver was \"nvme\", is null"
        );
        assert!(one.ensure_equal(&one.clone()).is_ok());
    }

    #[test]
    fn one_of_two_equal_entries_that_goes_is_a_difference() {
        let one = Snapshot(json!({"processes": ["p", "p"]}));
        let two = Snapshot(json!({"processes": ["p"]}));
        assert!(one.ensure_equal(&two).is_err());
    }

    #[test]
    fn program_that_is_forgotten_makes_no_difference_and_others_do() {
        let at = |keeper: u64, daemon: u64| {
            let program = |threads| json!({"threads": threads});
            let daemons = json!({"s keeper": program(keeper), "s daemon": program(daemon)});
            let processes = json!([
                format!("s keeper --parent={keeper}"),
                format!("s daemon {daemon}")
            ]);
            let mut snapshot = Snapshot(json!({"daemons": daemons, "processes": processes}));
            snapshot.forget_programs(" keeper");
            snapshot
        };
        assert!(at(1, 7).ensure_equal(&at(2, 7)).is_ok());
        assert!(at(1, 7).ensure_equal(&at(1, 8)).is_err());
    }

    /// Host b has one descriptor more in its first `moment` looks.
    fn looks(moment: usize) -> impl Fn() -> anyhow::Result<Both> {
        let looks = Cell::new(0);
        move || {
            looks.set(looks.get() + 1);
            let fds = if looks.get() <= moment { 8 } else { 7 };
            Ok((Snapshot(json!({})), Snapshot(json!({"fds": fds}))))
        }
    }

    #[test]
    fn what_lasts_a_moment_is_no_difference_and_what_stays_is() {
        let rest = looks(0)().unwrap();
        ensure_both_equal(&rest, looks(3)).unwrap();
        let error = ensure_both_equal(&rest, looks(usize::MAX)).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "host b: 1 differences: /fds was 7, is 8"
        );
    }

    #[test]
    fn host_is_at_rest_when_two_looks_are_alike() {
        let rest = looks(0)().unwrap();
        let found = both_at_rest(looks(1)).unwrap();
        rest.1.ensure_equal(&found.1).unwrap();
        let restless = Cell::new(0);
        let error = both_at_rest(|| {
            restless.set(restless.get() + 1);
            Ok((Snapshot(json!(restless.get())), Snapshot(json!(0))))
        });
        assert!(format!("{:#}", error.unwrap_err()).starts_with("never at rest: host a"));
    }

    #[test]
    fn resident_memory_may_grow_a_little() {
        let at = |kib: u64| Snapshot(json!({"daemons": {"d": {"resident_kib": kib}}}));
        assert!(
            at(1000)
                .ensure_equal(&at(1000 + super::RESIDENT_GROWTH_KIB_MAX))
                .is_ok()
        );
        assert!(
            at(1000)
                .ensure_equal(&at(1001 + super::RESIDENT_GROWTH_KIB_MAX))
                .is_err()
        );
    }
}
