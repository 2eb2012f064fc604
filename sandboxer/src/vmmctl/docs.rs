//! The documentation is held against the program: a page that names a command, a recipe or a file
//! that is not there fails the tests. (That the commands do what the pages say is tested in
//! `tests/e2e`.)

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser;

use super::Cli;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every page of the project: README, `docs/`, and the READMEs of its parts.
fn pages() -> Vec<(PathBuf, String)> {
    let root = root();
    let mut paths = vec![root.join("README.md")];
    for folder in ["", "docs", "tests"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap().flatten() {
            let path = entry.path();
            if folder == "docs" && path.extension().is_some_and(|e| e == "md") {
                paths.push(path);
            } else if path.join("README.md").is_file() {
                paths.push(path.join("README.md"));
            }
        }
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect()
}

/// What a page shows as typed: lines of its code blocks (`true`), and code within its sentences.
fn code(page: &str) -> Vec<(bool, String)> {
    let mut found = Vec::new();
    let mut block = false;
    let mut continued = String::new();
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            block = !block;
        } else if block {
            let line = line.trim().trim_start_matches("$ ");
            if let Some(begin) = line.strip_suffix('\\') {
                continued.push_str(begin);
            } else {
                found.push((true, std::mem::take(&mut continued) + line));
            }
        } else {
            let inline = line.split('`').skip(1).step_by(2);
            found.extend(inline.map(|code| (false, code.to_owned())));
        }
    }
    found
}

/// The words of a command up to its comment or the next command of the line.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = command.trim();
    while !rest.is_empty() {
        let quote = rest.starts_with(['\'', '"']).then(|| &rest[..1]);
        let end = match quote {
            Some(quote) => rest[1..].find(quote).map(|at| at + 2),
            None => rest.find(char::is_whitespace),
        }
        .unwrap_or(rest.len());
        let word = &rest[..end];
        if matches!(word, "&&" | "|" | "#" | ">") {
            break;
        }
        words.push(word.trim_matches(['\'', '"']).to_owned());
        rest = rest[end..].trim_start();
    }
    words
}

/// Commands of `program` in a page's code, as lists of words with the program first, and whether
/// they stand in a block, to be typed as they are.
fn commands(page: &str, program: &str) -> Vec<(bool, Vec<String>)> {
    let mut found = Vec::new();
    for (block, line) in code(page) {
        for command in line.split("&& ") {
            let words = words(command);
            if words.first().is_some_and(|first| first == program) {
                found.push((block, words));
            }
        }
    }
    found
}

#[test]
fn every_command_of_vmmctl_in_the_documentation_is_one() {
    use clap::error::ErrorKind::{
        DisplayHelpOnMissingArgumentOrSubcommand, MissingRequiredArgument, MissingSubcommand,
    };
    let mut seen = 0;
    for (path, page) in pages() {
        for (block, mut words) in commands(&page, "vmmctl") {
            // A name on its own, or a picture of boxes.
            if words.len() < 2 || words[1].starts_with(|c: char| !c.is_ascii_graphic()) {
                continue;
            }
            words.retain(|word| word != "…");
            seen += 1;
            match Cli::try_parse_from(&words) {
                Ok(_) => {}
                // A sentence names a command or an option, not all that it is used with.
                Err(e)
                    if !block
                        && matches!(
                            e.kind(),
                            MissingRequiredArgument
                                | MissingSubcommand
                                | DisplayHelpOnMissingArgumentOrSubcommand
                        ) => {}
                Err(e) => panic!("{}: `{}`: {e}", path.display(), words.join(" ")),
            }
        }
    }
    assert!(
        seen > 30,
        "only {seen} commands found: is the search broken?"
    );
}

#[test]
fn every_recipe_in_the_documentation_exists() {
    let justfile = std::fs::read_to_string(root().join("Justfile")).unwrap();
    let recipes: BTreeSet<&str> = justfile
        .lines()
        .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()) && !line.contains(":="))
        .filter_map(|line| line.split([' ', ':']).next())
        .collect();
    let mut seen = 0;
    for (path, page) in pages() {
        for program in ["just", "./dev"] {
            for (_, words) in commands(&page, program) {
                let Some(recipe) = words.get(1) else { continue };
                // `./dev RECIPE`
                if recipe.chars().all(|c| c.is_ascii_uppercase()) {
                    continue;
                }
                seen += 1;
                assert!(
                    recipes.contains(recipe.as_str()),
                    "{}: `{}`: there is no such recipe",
                    path.display(),
                    words.join(" ")
                );
            }
        }
    }
    assert!(
        seen > 20,
        "only {seen} recipes found: is the search broken?"
    );
}

#[test]
fn every_link_in_the_documentation_leads_to_a_file() {
    let mut seen = 0;
    for (path, page) in pages() {
        for target in page.split("](").skip(1) {
            let target = target.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            seen += 1;
            let file = path.parent().unwrap().join(target);
            assert!(file.exists(), "{}: link to {target}", path.display());
        }
    }
    assert!(seen > 30, "only {seen} links found: is the search broken?");
}
