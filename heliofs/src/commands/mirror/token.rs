//! Tokens: positions that are taken at the source and waited for at the mirror.

use std::time::Duration;

use clap::Args;
use heliofs_proto::ids::Position;
use serde_json::json;

use super::At;
use super::slots::show_position;
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::{output, units};

/// What to wait for.
#[derive(Args)]
pub(crate) struct Wait {
    #[command(flatten)]
    access: Access,
    /// META-URL VOLUME TOKEN, or helio://HOST[,HOST…]/VOLUME TOKEN, of the mirror.
    #[arg(value_name = "META-URL")]
    first: String,
    /// As above; the TOKEN when two are given.
    #[arg(value_name = "VOLUME")]
    second: String,
    /// As above.
    #[arg(value_name = "TOKEN")]
    third: Option<String>,
    /// Gives up after this long, with exit code 1.
    #[arg(long, value_parser = units::parse_duration, default_value = "60s", value_name = "TIME")]
    timeout: Duration,
    /// Waits for the data as well: until the mirror's own bucket has every object that is referenced there.
    #[arg(long)]
    data: bool,
}

fn parse(token: &str) -> Outcome<Position> {
    token.parse().map_err(|error| {
        Failure::usage(error).hint("`heliofs mirror token` at the source prints one")
    })
}

pub(super) async fn print(at: At, json: bool) -> Outcome {
    let target = at.access.target(&at.url, at.name.as_deref())?;
    let volume = target.cluster.get_volume(&target.volume).await?;
    let token = show_position(volume.position);
    if json {
        return output::print_json(&json!({ "volume": target.volume, "token": token }));
    }
    output::line(token)
}

pub(super) async fn wait(options: Wait, json: bool) -> Outcome {
    let (volume, token) = match &options.third {
        Some(third) => (Some(&options.second), third),
        None => (None, &options.second),
    };
    let position = parse(token)?;
    let volume = volume.map(String::as_str);
    let target = options.access.target(&options.first, volume)?;
    let begun = std::time::Instant::now();
    let waited =
        target
            .cluster
            .mirror_wait(&target.volume, position, options.data, options.timeout);
    let (reached, at) = waited.await?;
    let what = match options.data {
        true => "complete",
        false => "applied",
    };
    if !reached {
        return Err(Failure::new(format!(
            "{} has not reached {position} within {:?}: {what} is {at}",
            target.volume, options.timeout
        ))
        .hint("`heliofs mirror status` shows what it does"));
    }
    let millis = begun.elapsed().as_millis() as u64;
    if json {
        return output::print_json(
            &json!({ "volume": target.volume, what: at.to_string(), "waited_ms": millis }),
        );
    }
    output::line(format_args!("{} is {what} up to {at}", target.volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_position() {
        let position = parse("3:17").unwrap();
        assert_eq!((position.epoch.0, position.seq), (3, 17));
        assert_eq!(parse(&position.to_string()).unwrap(), position);
        for bad in ["", "17", "a:1", "1:", ":1", "1:2:3", "-1:2"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
