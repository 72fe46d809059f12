//! Bars for long work: on a terminal, on standard error, so that output can be piped.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over `length` of something; invisible unless somebody looks. `bytes`: shown as sizes.
pub(crate) fn bar(what: &str, length: u64, bytes: bool, json: bool) -> ProgressBar {
    let seen = std::io::stderr().is_terminal() && !json;
    let target = match seen {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(length), target);
    let counts = match bytes {
        true => "{bytes}/{total_bytes} {bytes_per_sec}",
        false => "{pos}/{len} {per_sec}",
    };
    let template = format!("{{msg}} {{wide_bar}} {counts}, {{eta}} left");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}
