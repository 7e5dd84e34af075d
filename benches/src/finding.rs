//! The answer to one question: tables to read, goals to hold it against, figures to keep.

use serde::Serialize;
use serde_json::Value;

use crate::plot::Chart;
use crate::spread::Goal;
use crate::table::Table;

/// An answer.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// A short name, as the subcommand is called.
    pub name: String,
    /// The question, as a heading.
    pub title: String,
    /// What one has to know to read the tables, a sentence or a few each.
    pub notes: Vec<String>,
    /// Tables with a heading each; they show what is in `figures`.
    #[serde(skip)]
    pub tables: Vec<(String, Table)>,
    /// Figures that are to reach something.
    pub goals: Vec<Goal>,
    /// What is drawn.
    #[serde(skip)]
    pub charts: Vec<Chart>,
    /// Every figure of every round.
    pub figures: Value,
    /// Everything that was wrong; empty when the figures count.
    pub faults: Vec<String>,
}

impl Finding {
    /// Nothing found yet.
    pub fn new(name: &str, title: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            title: title.into(),
            notes: Vec::new(),
            tables: Vec::new(),
            goals: Vec::new(),
            charts: Vec::new(),
            figures: Value::Null,
            faults: Vec::new(),
        }
    }

    /// Whether nothing was wrong. A goal that is not reached is not wrong.
    pub fn is_sound(&self) -> bool {
        self.faults.is_empty()
    }

    /// The goals of all groups, in their order.
    pub fn goal_table(&self) -> Option<Table> {
        if self.goals.is_empty() {
            return None;
        }
        let mut table =
            Table::new(2, ["what is compared", "figure", "median (least–most)", "target", "result"]);
        for goal in &self.goals {
            let found = format!("{}{}", goal.found, if goal.unit == "×" { "" } else { goal.unit });
            table.row([
                goal.group.clone(),
                goal.what.clone(),
                found,
                goal.bound.to_string(),
                goal.verdict().into(),
            ]);
        }
        Some(table)
    }

    /// Goals that have a bound, and how many of them are reached.
    pub fn score(&self) -> (usize, usize) {
        let met: Vec<bool> = self.goals.iter().filter_map(Goal::is_met).collect();
        (met.len(), met.iter().filter(|met| **met).count())
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "## {}\n", self.title)?;
        for fault in &self.faults {
            writeln!(f, "* **WRONG: {fault}**")?;
        }
        for note in &self.notes {
            writeln!(f, "* {note}")?;
        }
        for (heading, table) in &self.tables {
            writeln!(f, "\n### {heading}\n\n{table}")?;
        }
        if let Some(goals) = self.goal_table() {
            let (all, met) = self.score();
            let heading =
                if all == 0 { "Ratios".to_owned() } else { format!("Targets: {met} of {all} reached") };
            writeln!(f, "\n### {heading}\n\n{goals}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spread::{Bound, Spread};

    #[test]
    fn goals_stand_beside_what_was_found() {
        let mut finding = Finding::new("serve", "How fast?");
        finding.goals.extend(Goal::ratio("read", "raw", Spread::of([2.5]), Bound::AtLeast(2.0)));
        finding.goals.extend(Goal::ratio("read", "vhd", Spread::of([1.5]), Bound::AtLeast(2.0)));
        finding.goals.extend(Goal::ratio("read", "vhdx", Spread::of([1.5]), Bound::None));
        finding.faults.push("page 7".into());
        let text = finding.to_string();
        assert!(text.contains("Targets: 1 of 2 reached") && text.contains("**fail**"), "{text}");
        assert!(text.contains("**WRONG: page 7**") && !finding.is_sound());
    }
}
