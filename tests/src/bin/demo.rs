//! `./dev demo`: parts in the lab and on the machine itself, then the table of all.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bulkhead_tests::demo::vmmctl::Kernel;
use bulkhead_tests::demo::{self, Row};

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["microvm", out] => write(out, &demo::vmmctl::rows(Kernel::Linux)?)?,
        ["appkernel", out] => write(out, &demo::vmmctl::rows(Kernel::App)?)?,
        ["cri", out] => write(out, &demo::cri::rows()?)?,
        ["wasm", out] => write(out, &demo::wasm::rows()?)?,
        ["show", out, parts @ ..] => {
            let mut rows: Vec<Row> = Vec::new();
            for part in parts {
                let text = fs::read(part).with_context(|| (*part).to_owned())?;
                rows.extend(serde_json::from_slice::<Vec<Row>>(&text)?);
            }
            write(out, &rows)?;
            let good = demo::print(&rows);
            println!("written to {out}");
            if !good {
                return Ok(ExitCode::FAILURE);
            }
        }
        _ => bail!(
            "usage: demo microvm|appkernel|cri|wasm OUT.json | demo show OUT.json PART.json..."
        ),
    }
    Ok(ExitCode::SUCCESS)
}

fn write(out: &str, rows: &[Row]) -> Result<()> {
    if let Some(dir) = Path::new(out).parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(out, serde_json::to_vec_pretty(rows)?).with_context(|| out.to_owned())
}
