//! Runs the scripts beside this file: each command with the reply, the changes and the invalidations that it must have.
//!
//! A script is commands, one a line, comments (`# …`) and, indented below a command, what came out. `UPDATE_GOLDEN=1` rewrites
//! what came out; the difference is then read by a person. After every command the whole volume is checked.
//!
//! `script.rs` has the words that commands are made of, `show.rs` what results look like.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod script;
mod show;

use std::fmt::Write;
use std::path::Path;

fn run(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    let mut volume = script::Volume::default();
    let mut rewritten = String::new();
    for (number, line) in text.lines().enumerate() {
        if line.starts_with(' ') {
            continue;
        }
        writeln!(rewritten, "{line}").unwrap();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let shown = volume
            .run(line)
            .unwrap_or_else(|why| panic!("{name}:{}: {line}: {why}", number + 1));
        for line in shown {
            writeln!(rewritten, "  {line}").unwrap();
        }
    }
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, rewritten).unwrap();
        return;
    }
    for (number, (expected, actual)) in text.lines().zip(rewritten.lines()).enumerate() {
        assert_eq!(expected, actual, "{name}:{}", number + 1);
    }
    assert_eq!(
        text.lines().count(),
        rewritten.lines().count(),
        "{name}: a result is missing"
    );
}

#[test]
fn namespace_commands_do_what_their_script_says() {
    run("namespace.txt");
}

#[test]
fn conditional_commits_do_what_their_script_says() {
    run("condition.txt");
}

#[test]
fn renames_do_what_their_script_says() {
    run("rename.txt");
}

#[test]
fn attributes_and_acls_do_what_their_script_says() {
    run("attributes.txt");
}

#[test]
fn sessions_get_exactly_once_as_their_script_says() {
    run("sessions.txt");
}

#[test]
fn tree_removals_do_what_their_script_says() {
    run("remove_tree.txt");
}

#[test]
fn the_trash_does_what_its_script_says() {
    run("trash.txt");
}

#[test]
fn relocations_do_what_their_script_says() {
    run("relocate.txt");
}

#[test]
fn quotas_do_what_their_script_says() {
    run("quota.txt");
}

#[test]
fn snapshots_do_what_their_script_says() {
    run("snapshot.txt");
}

#[test]
fn every_script_is_run() {
    let source = include_str!("main.rs");
    for entry in
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).unwrap()
    {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            !name.ends_with(".txt") || source.contains(&format!("run(\"{name}\")")),
            "{name}"
        );
    }
}

#[test]
fn batches_do_what_their_script_says() {
    run("batch.txt");
}
