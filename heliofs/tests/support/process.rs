//! A process whose output goes to a file, and which never outlives the test.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{spawner, wait_for};

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended(i32);

impl Ended {
    pub fn success(self) -> bool {
        self.0 == 0
    }

    /// `None` when a signal ended it.
    pub fn code(self) -> Option<i32> {
        (self.0 < 128).then_some(self.0)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code() {
            Some(code) => write!(f, "exit code {code}"),
            None => write!(f, "signal {}", self.0 - 128),
        }
    }
}

pub struct Process {
    name: String,
    log: PathBuf,
    pid: Pid,
    ended: Option<Ended>,
}

impl Process {
    pub fn start(
        name: &str,
        log: &Path,
        program: &Path,
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = Command::new(program);
        prepare(&mut command);
        Self {
            name: name.to_owned(),
            log: log.to_owned(),
            pid: spawner::start(&command, log),
            ended: None,
        }
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Stops it where it is. On return no thread of it runs; one in a system call may still be in there.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        wait_for(
            "the process to stand still",
            Duration::from_secs(10),
            || {
                let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).ok()?;
                let runs = |stat: String| {
                    let state = stat
                        .rsplit(") ")
                        .next()
                        .and_then(|rest| rest.chars().next());
                    matches!(state, Some('R' | 'S'))
                };
                let stats = tasks
                    .filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
                (!stats.into_iter().any(runs)).then_some(())
            },
        );
    }

    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            match kill(self.pid, signal) {
                // It ended a moment ago.
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(errno) => panic!("{signal} to {}: {errno}", self.name),
            }
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait(Duration::from_secs(30));
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<Ended> {
        if self.ended.is_none() {
            // The shell remembers the exit codes of its children until they are asked for.
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
            let state = stat
                .rsplit(") ")
                .next()
                .and_then(|rest| rest.chars().next());
            if matches!(state, None | Some('Z' | 'X')) {
                self.ended = Some(Ended(spawner::exit_code(self.pid)));
            }
        }
        self.ended
    }

    pub fn wait(&mut self, within: Duration) -> Ended {
        let what = format!("the end of {}", self.name);
        wait_for(&what, within, || self.ended())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of the log, for messages.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
        if std::thread::panicking() {
            eprintln!("---- log of {}\n{}", self.name, self.log_tail());
        }
    }
}
