//! `-d`: the command starts itself again without a terminal, and waits for its word that it is ready or why it is not.
//!
//! A process with threads must not fork, so the child is a new process. Its standard output is a pipe to the parent until it
//! has spoken: one line of JSON, either `{"ready": …}` or a [`Failure`].

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::failure::{Failure, Outcome, While};

/// Set in the child.
const CHILD: &str = "HELIOFS_BACKGROUND_CHILD";

/// Whether this process is the child.
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Starts the child with `arguments`, and `environment` in addition to ours, and waits for its word; its process id and what it said.
pub(crate) fn spawn(
    arguments: &[OsString],
    environment: Vec<(&'static str, OsString)>,
) -> Outcome<(u32, Value)> {
    let program = std::env::current_exe().while_("find this program")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env(CHILD, "1")
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Panics and the like before the log is open; afterwards the log has its own file.
        .stderr(Stdio::inherit())
        .spawn()
        .while_("start the background process")?;
    let pipe = child.stdout.take().expect("it was asked for");
    let mut word = String::new();
    BufReader::new(pipe)
        .read_line(&mut word)
        .while_("read from the background process")?;
    if let Ok(value) = serde_json::from_str::<Value>(&word) {
        if let Some(ready) = value.get("ready") {
            return Ok((child.id(), ready.clone()));
        }
        if let Some(failure) = Failure::from_json(&value) {
            child.wait().while_("wait for the background process")?;
            return Err(failure);
        }
    }
    let status = child.wait().while_("wait for the background process")?;
    Err(Failure::new(format!(
        "the background process ended before it was ready ({status})"
    )))
}

/// In the child, first: leaves the terminal's session, so that its end does not end the mount.
pub(crate) fn detach_from_terminal() -> Outcome {
    nix::unistd::setsid().while_("start a session of its own")?;
    // A directory in use can't be unmounted.
    std::env::set_current_dir("/").while_("change to /")
}

/// In the child: tells the parent that it is ready, and lets go of its pipes.
pub(crate) fn ready(value: &Value) -> Outcome {
    say(&json!({ "ready": value }))?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .while_("open /dev/null")?;
    nix::unistd::dup2_stdout(&null).while_("close standard output")?;
    nix::unistd::dup2_stderr(&null).while_("close standard error")
}

/// In the child: tells the parent why it failed, if it has not been told that all is well; the log has it in any case.
pub(crate) fn failed(failure: &Failure) {
    tracing::error!(failure = %failure.to_json(), "the mount failed");
    if let Err(error) = say(&failure.to_json()) {
        tracing::error!(?error, "the parent could not be told");
    }
}

fn say(value: &Value) -> Outcome {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")
        .and_then(|()| out.flush())
        .while_("speak to the parent process")
}
