//! Starts every process of the tests, from a shell that was started first and has no file of a mount open.
//!
//! A process that is started from here inherits, until its execve, what the test has open, and closes it there. Closing a file on
//! a mount is a flush, which waits while the metadata is away; so a test that holds files open could not even start the node that
//! would end the outage.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::unistd::Pid;

use super::scratch;

struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

thread_local! {
    static SHELL: RefCell<Option<Shell>> = const { RefCell::new(None) };
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One line to the shell, one line back.
fn ask(line: &str) -> String {
    SHELL.with_borrow_mut(|shell| {
        let shell = shell.get_or_insert_with(|| {
            // Dies with the thread that it serves, and everything that it started dies with it.
            let mut child = Command::new("setpriv")
                .args([
                    "--pdeathsig",
                    "KILL",
                    "bash",
                    "-c",
                    "while IFS= read -r line; do eval \"$line\"; done",
                ])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                // It would report each process that a signal ended.
                .stderr(Stdio::null())
                .spawn()
                .expect("setpriv and bash are there: run .ci/setup test");
            let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
            Shell {
                child,
                input,
                output: BufReader::new(output),
            }
        });
        writeln!(shell.input, "{line}").unwrap();
        shell.input.flush().unwrap();
        let mut answer = String::new();
        shell.output.read_line(&mut answer).unwrap();
        assert!(!answer.is_empty(), "the shell ended at: {line}");
        answer.trim().to_owned()
    })
}

/// Starts the shell now, before anything is mounted.
pub fn ready() {
    assert_eq!(ask("echo ready"), "ready");
}

fn quote(text: &std::ffi::OsStr) -> String {
    let text = text.to_str().expect("tests use names that are text");
    assert!(!text.contains('\n'), "one line a command");
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The command with its changes to the environment, for the shell.
fn words(command: &Command) -> String {
    let mut words = vec!["env".to_owned()];
    if let Some(directory) = command.get_current_dir() {
        words.push(format!("--chdir={}", quote(directory.as_os_str())));
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => words.push(format!("{}={}", name.to_str().unwrap(), quote(value))),
            None => words.insert(1, format!("--unset={}", name.to_str().unwrap())),
        }
    }
    words.push(quote(command.get_program()));
    words.extend(command.get_args().map(quote));
    words.join(" ")
}

/// Starts it in the background, its output appended to `log`.
pub fn start(command: &Command, log: &std::path::Path) -> Pid {
    let words = words(command);
    let log = quote(log.as_os_str());
    let pid = ask(&format!(
        "setpriv --pdeathsig KILL {words} >>{log} 2>&1 </dev/null & echo $!"
    ));
    Pid::from_raw(
        pid.parse()
            .unwrap_or_else(|_| panic!("not a process id: {pid}")),
    )
}

/// The exit code of a process that [`start`] started and that has ended; 128 and more: the signal.
pub fn exit_code(pid: Pid) -> i32 {
    ask(&format!("wait {pid} 2>/dev/null; echo $?"))
        .parse()
        .unwrap()
}

/// Runs it to its end: exit code, standard output, standard error.
pub fn run(command: &Command) -> (i32, Vec<u8>, Vec<u8>) {
    let scratch = scratch();
    let (out, err) = (scratch.path().join("out"), scratch.path().join("err"));
    let line = format!(
        "{} >{} 2>{} </dev/null; echo $?",
        words(command),
        quote(out.as_os_str()),
        quote(err.as_os_str())
    );
    let code = ask(&line).parse().unwrap();
    (
        code,
        std::fs::read(out).unwrap(),
        std::fs::read(err).unwrap(),
    )
}
