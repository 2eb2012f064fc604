//! `vmmctl inspect`: configuration, memory map, devices, and where a boot spent its time.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::error::CliError;
use super::{Context, print, print_json};
use crate::engine::Sandbox;
use crate::engine::agent::Agent;

/// Show a VM's configuration, memory map, devices and queues.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl inspect a41f
  vmmctl inspect a41f --boot
  vmmctl inspect a41f --boot --svg boot.svg
  vmmctl inspect a41f --registers")]
pub struct Args {
    /// Id or name of the VM.
    id: String,
    /// Only the boot's time line.
    #[arg(long)]
    boot: bool,
    /// Draw the boot's time line into FILE.
    #[arg(long, value_name = "FILE", requires = "boot")]
    svg: Option<PathBuf>,
    /// The vCPUs' registers instead.
    #[arg(long, conflicts_with = "boot")]
    registers: bool,
}

/// Runs the command.
pub fn run(args: &Args, context: &Context) -> Result<u8, CliError> {
    let (found, remote) = context.find(&args.id)?;
    if args.registers {
        print_json(&remote.registers()?)?;
        return Ok(0);
    }
    let mut vm = remote.inspect()?;
    if found.state.kind == "appkernel" && found.state.mode != "boot" && !args.boot {
        // A guest that does not answer is looked at all the more.
        vm["unknown_calls"] = match unknown_calls(remote) {
            Ok(count) => count.into(),
            Err(e) => format!("not known: {e}").into(),
        };
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, svg(&vm["timeline"], &found.state.id))
            .map_err(|e| CliError::io(format!("drawing {}", path.display()), e))?;
        return Ok(0);
    }
    if args.boot {
        if context.json {
            print_json(&vm["timeline"])?;
        } else {
            print(&bars(&vm["timeline"]))?;
        }
        return Ok(0);
    }
    let state = serde_json::to_value(&found.state).map_err(|e| CliError::io("state", e.into()))?;
    print_json(&serde_json::json!({"state": state, "vm": vm}))?;
    Ok(0)
}

/// System calls that the app kernel's programs made and it has not.
fn unknown_calls(sandbox: Arc<dyn Sandbox>) -> Result<Option<u64>, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::io("starting the runtime", e))?;
    let info = runtime.block_on(async { Agent::connect(sandbox).await?.hello().await });
    runtime.shutdown_background();
    Ok(info?.unknown_calls)
}

struct Stage {
    name: String,
    at_ms: f64,
    took_ms: f64,
}

/// Stages with the time since the one before. What a guest put into a name is made printable.
fn stages(timeline: &Value) -> Vec<Stage> {
    let mut before = 0.0;
    timeline
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|mark| {
            let at_ms = mark["us"].as_f64()? / 1000.0;
            let name: String = mark["stage"]
                .as_str()?
                .chars()
                .filter(|c| !c.is_control())
                .take(40)
                .collect();
            let took_ms = (at_ms - before).max(0.0);
            before = at_ms;
            Some(Stage {
                name,
                at_ms,
                took_ms,
            })
        })
        .collect()
}

/// Bars in eighths of a column, longest stage 40 columns.
pub fn bars(timeline: &Value) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let stages = stages(timeline);
    let longest = stages.iter().map(|s| s.took_ms).fold(0.001, f64::max);
    let width = stages
        .iter()
        .map(|s| s.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for (number, stage) in stages.iter().enumerate() {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and 320"
        )]
        let eighths = ((stage.took_ms / longest * 320.0).round() as usize).max(1);
        let mut bar = "█".repeat(eighths / 8);
        if !eighths.is_multiple_of(8) {
            bar.push(EIGHTHS[eighths % 8]);
        }
        let unit = if number == 0 { "ms" } else { "  " };
        let _ = writeln!(
            out,
            "{:>8.1} {unit}  {:<width$}  {bar}",
            stage.at_ms, stage.name
        );
    }
    out
}

/// The same as a drawing.
fn svg(timeline: &Value, id: &str) -> String {
    let stages = stages(timeline);
    let total = stages.last().map_or(1.0, |s| s.at_ms.max(0.001));
    let height = 40 + stages.len() * 26;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"10\" y=\"22\" font-weight=\"bold\">Boot of {} ({total:.1} ms)</text>\n",
        escape(id)
    );
    for (row, stage) in stages.iter().enumerate() {
        let y = 36 + row * 26;
        let start = 220.0 + (stage.at_ms - stage.took_ms) / total * 540.0;
        let width = (stage.took_ms / total * 540.0).max(1.0);
        let _ = writeln!(
            out,
            "<text x=\"10\" y=\"{}\">{}</text><rect x=\"{start:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"#3b6ea5\"/>\
             <text x=\"{:.1}\" y=\"{}\" fill=\"#444\">{:.1} ms</text>",
            y + 14,
            escape(&stage.name),
            (start + width + 6.0).min(790.0),
            y + 14,
            stage.took_ms
        );
    }
    out.push_str("</svg>\n");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bars_show_where_the_time_went() {
        let timeline = json!([{"us": 1900, "stage": "kvm ready"}, {"us": 31700, "stage": "agent answers\u{1b}[2J"}]);
        let text = bars(&timeline);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].contains("1.9 ms  kvm ready") && lines[1].ends_with(&"█".repeat(40)),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'));
        assert_eq!(bars(&Value::Null), "");
        let drawn = svg(&json!([{"us": 5, "stage": "<x>"}]), "a41f");
        assert!(drawn.contains("&lt;x&gt;") && drawn.ends_with("</svg>\n"));
    }
}
