//! The main job: real programs from real images, in every kind of sandbox that exists, and a table
//! of what ran and how long.

use serde::{Deserialize, Serialize};

pub mod cri;
pub mod vmmctl;
pub mod wasm;

/// One run, as it stands in `target/demo.json`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// `microvm`, `appkernel`, `wasm` or `process`.
    pub sandbox: String,
    /// Who asked for it: `vmmctl` or `cri`.
    pub via: String,
    /// Image or program.
    pub image: String,
    /// Its command line.
    pub command: String,
    /// Its exit code.
    pub exit_code: i32,
    /// What it printed.
    pub stdout: String,
    /// From the start to where the program could start, in ms.
    pub boot_ms: f64,
    /// From the start to its end, in ms.
    pub total_ms: f64,
    /// What was wrong; absent when all was as expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// Prints the table; true if everything was as expected.
pub fn print(rows: &[Row]) -> bool {
    let short = |text: &str, width: usize| -> String {
        let line = text.lines().last().unwrap_or("");
        if line.chars().count() > width {
            line.chars().take(width - 1).chain(['…']).collect()
        } else {
            line.to_owned()
        }
    };
    println!(
        "\n{:<10} {:<40} {:<9} {:<7} {:<44} {:>4} {:>8} {:>9}",
        "IMAGE", "COMMAND", "SANDBOX", "VIA", "OUTPUT", "EXIT", "BOOT ms", "TOTAL ms"
    );
    for row in rows {
        println!(
            "{:<10} {:<40} {:<9} {:<7} {:<44} {:>4} {:>8.0} {:>9.0}",
            row.image,
            short(&row.command, 40),
            row.sandbox,
            row.via,
            short(&row.stdout, 44),
            row.exit_code,
            row.boot_ms,
            row.total_ms
        );
    }
    let mut good = true;
    for row in rows {
        if let Some(why) = &row.failure {
            good = false;
            println!("FAILED {} {}: {why}", row.image, short(&row.command, 40));
        }
    }
    good
}
