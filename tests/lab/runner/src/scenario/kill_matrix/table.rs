//! The kill matrix as a table: a row for each victim and deed, a column for each stage, notes below.

use super::cell::{Cell, DEEDS, Plan, STAGES, VICTIMS};
use anyhow::{Result, ensure};
use std::fmt::Write;

/// What came of the cells that were struck.
#[derive(Default)]
pub struct Table {
    outcomes: Vec<(Cell, bool)>,
}

impl Table {
    /// Notes a cell.
    pub fn enter(&mut self, cell: Cell, passed: bool) {
        self.outcomes.push((cell, passed));
    }

    fn word(&self, cell: Cell, notes: &mut Vec<String>) -> String {
        let mut note = |reason: &str| {
            let text = format!("n/a: {reason}");
            let known = notes.iter().position(|other| *other == text);
            let index = known.unwrap_or_else(|| {
                notes.push(text);
                notes.len() - 1
            });
            format!("n/a {}", index + 1)
        };
        match (
            cell.plan(),
            self.outcomes.iter().find(|(one, _)| *one == cell),
        ) {
            (_, Some((_, true))) => "ok".to_owned(),
            (_, Some((_, false))) => "FAIL".to_owned(),
            (Plan::Never(reason), None) => note(reason),
            (Plan::Strike, None) => String::new(),
        }
    }

    /// The whole of it, for people.
    pub fn text(&self) -> String {
        let mut notes = Vec::new();
        let mut text = format!("{:22}", "");
        for stage in STAGES {
            let _ = write!(text, " {:8}", format!("{stage:?}").to_lowercase());
        }
        for victim in VICTIMS {
            for deed in DEEDS {
                let row = format!("{victim:?} {}", format!("{deed:?}").to_lowercase());
                let _ = write!(text, "\n{row:22}");
                for stage in STAGES {
                    let cell = Cell {
                        victim,
                        stage,
                        deed,
                    };
                    let _ = write!(text, " {:8}", self.word(cell, &mut notes));
                }
            }
        }
        for (index, note) in notes.iter().enumerate() {
            let _ = write!(text, "\n{} {note}", index + 1);
        }
        text
    }

    /// Each cell that can be was struck, and held.
    pub fn ensure_full(&self) -> Result<String> {
        let wanting: Vec<_> = Cell::all()
            .filter(|cell| cell.plan() == Plan::Strike)
            .filter(|cell| !self.outcomes.contains(&(*cell, true)))
            .collect();
        ensure!(wanting.is_empty(), "not shown: {wanting:?}");
        Ok(format!("{} cells", self.outcomes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_with_an_empty_cell_is_not_full_and_each_reason_stands_once() {
        let mut table = Table::default();
        let struck: Vec<_> = Cell::all()
            .filter(|cell| cell.plan() == Plan::Strike)
            .collect();
        for cell in &struck[1..] {
            table.enter(*cell, true);
        }
        assert!(table.ensure_full().is_err());
        table.enter(struck[0], true);
        assert!(table.ensure_full().is_ok());
        let text = table.text();
        let reason = "n/a: a kernel stands still with its VMM";
        assert_eq!(text.matches(reason).count(), 1, "{text}");
        assert_eq!(text.matches("LenderPort killed").count(), 1, "{text}");
    }
}
