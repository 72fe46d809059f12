//! `heliofs version`

use heliofs_proto::limits::WIRE_VERSION;

use crate::failure::Outcome;
use crate::output;

/// What nodes and mounts call themselves in `heliofs status`.
pub(crate) const BUILD: &str = concat!("heliofs ", env!("CARGO_PKG_VERSION"));

/// What `--version` prints.
pub(crate) const LONG: &str = env!("CARGO_PKG_VERSION");

pub(crate) fn run(json: bool) -> Outcome {
    if json {
        return output::print_json(&serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "wire_version": WIRE_VERSION,
        }));
    }
    output::line(format_args!("{BUILD} (wire version {WIRE_VERSION})"))
}
