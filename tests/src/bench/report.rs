//! The table and the JSON of a benchmark.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One measured figure beside a peer's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// What is measured.
    pub what: String,
    /// Its unit.
    pub unit: String,
    /// Median of ours.
    pub ours: f64,
    /// The peer's name.
    pub peer: String,
    /// The peer's version.
    pub peer_version: String,
    /// Median of the peer's.
    pub peer_value: Option<f64>,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
    /// The goal, in words.
    pub goal: String,
    /// Whether it is met.
    pub met: bool,
    /// Our samples.
    pub samples: Vec<f64>,
    /// The peer's samples.
    pub peer_samples: Vec<f64>,
    /// The goal, for a program.
    pub limit: Goal,
    /// What was run.
    pub command: String,
}

/// What a figure must reach.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// At most this ratio to the peer.
    Ratio(f64),
    /// At most this value.
    Value(f64),
    /// Shown beside the peer only.
    Shown,
}

/// Collects rows.
#[derive(Debug)]
pub struct Report {
    /// Name of the benchmark.
    pub name: String,
    peer: String,
    peer_version: String,
    rows: Vec<Row>,
}

/// The middle sample, or the mean of the two.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

impl Report {
    /// A report beside `peer`.
    pub fn new(name: &str, peer: &str, peer_version: &str) -> Self {
        Self {
            name: name.into(),
            peer: peer.into(),
            peer_version: peer_version.into(),
            rows: Vec::new(),
        }
    }

    /// The rows that follow are beside this peer.
    pub fn beside(&mut self, peer: &str, version: &str) {
        peer.clone_into(&mut self.peer);
        version.clone_into(&mut self.peer_version);
    }

    /// Adds a figure; `peer` may be empty where the peer has no such thing.
    pub fn add(
        &mut self,
        what: &str,
        unit: &str,
        ours: &[f64],
        peer: &[f64],
        goal: Goal,
        command: &str,
    ) {
        let value = median(ours);
        let peer_value = (!peer.is_empty()).then(|| median(peer));
        let ratio = peer_value.filter(|p| *p > 0.0).map(|p| value / p);
        let (words, met) = match goal {
            Goal::Ratio(limit) => (
                format!("at most {limit:.2} of the peer's"),
                ratio.is_some_and(|r| r <= limit),
            ),
            Goal::Value(limit) => (format!("at most {limit} {unit}"), value <= limit),
            Goal::Shown => ("shown".to_owned(), true),
        };
        // A run that is cut off later has said this much.
        eprintln!("{what}: {value:.2} {unit}, {}: {peer_value:.2?}", self.peer);
        self.rows.push(Row {
            what: what.into(),
            unit: unit.into(),
            ours: value,
            peer: self.peer.clone(),
            peer_version: self.peer_version.clone(),
            peer_value,
            ratio,
            goal: words,
            met,
            samples: ours.to_vec(),
            peer_samples: peer.to_vec(),
            limit: goal,
            command: command.into(),
        });
    }

    /// Joins the results of several runs (each on a fresh host): samples of the same figure are
    /// put together.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn merge(name: &str, files: &[std::path::PathBuf]) -> Result<Self> {
        let mut all: Vec<Row> = Vec::new();
        for file in files {
            let text = std::fs::read(file).with_context(|| file.display().to_string())?;
            let rows: Vec<Row> = serde_json::from_slice(&text)?;
            for row in rows {
                match all.iter_mut().find(|known| known.what == row.what) {
                    Some(known) => {
                        known.samples.extend(row.samples);
                        known.peer_samples.extend(row.peer_samples);
                    }
                    None => all.push(row),
                }
            }
        }
        let first = all.first().context("no results")?;
        let mut report = Self::new(name, &first.peer, &first.peer_version);
        for row in &all {
            report.beside(&row.peer, &row.peer_version);
            report.add(
                &row.what,
                &row.unit,
                &row.samples,
                &row.peer_samples,
                row.limit,
                &row.command,
            );
        }
        report.beside(&first.peer, &first.peer_version);
        Ok(report)
    }

    /// The rows so far.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Writes `NAME.json` into `directory` and prints the table.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self, directory: &Path) -> Result<()> {
        std::fs::create_dir_all(directory)?;
        let path = directory.join(format!("{}.json", self.name));
        std::fs::write(&path, serde_json::to_vec_pretty(&self.rows)?)?;
        println!(
            "\n{}, beside {} {}",
            self.name, self.peer, self.peer_version
        );
        println!(
            "{:<52} {:>10} {:>10} {:>7}  {:<26} {:>3}",
            "what", "ours", "peer", "ratio", "goal", "met"
        );
        for row in &self.rows {
            let number = |value: Option<f64>| {
                value.map_or("–".into(), |v| {
                    if v >= 100.0 {
                        format!("{v:.0}")
                    } else {
                        format!("{v:.2}")
                    }
                })
            };
            println!(
                "{:<52} {:>10} {:>10} {:>7}  {:<26} {:>3}",
                format!("{}, {}", row.what, row.unit),
                number(Some(row.ours)),
                number(row.peer_value),
                row.ratio.map_or("–".into(), |r| format!("{r:.3}")),
                row.goal,
                if row.met { "yes" } else { "NO" }
            );
        }
        println!("written to {}", path.display());
        Ok(())
    }
}
