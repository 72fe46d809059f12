//! Tables for people, JSON for programs.

use std::io::Write;

use comfy_table::{Table, presets};

use crate::failure::{Outcome, While};

/// A table without frames: reads well, and pipes into other tools.
pub(crate) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.map(|name| name.to_uppercase()));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// One line to standard output. A reader that went away (`| head`) ends the command quietly.
pub(crate) fn line(text: impl std::fmt::Display) -> Outcome {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.while_("write to standard output"),
    }
}

/// A table, its trailing blanks trimmed.
pub(crate) fn print_table(table: &Table) -> Outcome {
    line(table.trim_fmt())
}

/// Pretty for people who look at it; any parser takes it.
pub(crate) fn print_json(value: &serde_json::Value) -> Outcome {
    line(serde_json::to_string_pretty(value).while_("encode JSON")?)
}
