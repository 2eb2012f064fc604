//! "Did you mean …?": the nearest name to a mistyped one.

use std::path::Path;

/// Edit distance (insert, delete, replace), bounded by the lengths of the names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The candidate that is close enough to `name` to be what was meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (distance(name, c), c))
        .filter(|(d, c)| *d <= 1 + name.len().max(c.len()) / 4)
        .min()
        .map(|(_, c)| c)
}

/// ` (did you mean …?)` for a path that does not exist but has a similarly named sibling, else
/// the empty string.
pub fn sibling(path: &Path) -> String {
    let Some(name) = path.file_name().map(|n| n.to_string_lossy().into_owned()) else {
        return String::new();
    };
    let parent = path.parent().unwrap_or(Path::new(""));
    let dir = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    // A directory with very many entries is not worth reading for a hint.
    let names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .take(2000)
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    match nearest(&name, names.iter().map(String::as_str)) {
        Some(found) => {
            let found = parent.join(found);
            let dot = if path.starts_with("./") && !found.starts_with(".") {
                "./"
            } else {
                ""
            };
            format!(" (did you mean {dot}{}?)", found.display())
        }
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_typo() {
        assert_eq!(nearest("dta", ["data", "logs"]), Some("data"));
        assert_eq!(nearest("xyz", ["data", "logs"]), None);
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("data")).expect("mkdir");
        let hint = sibling(&dir.path().join("dta"));
        assert!(
            hint.contains("did you mean") && hint.contains("/data?"),
            "{hint}"
        );
    }
}
