//! fcntl and flock locks within a mount and across two.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Cluster, Mount, wait_for};

struct Two {
    a: Mount,
    b: Mount,
    _cluster: Cluster,
}

fn two(volume: &str) -> Two {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file(volume, &[]);
    Two {
        a: cluster.mount(volume),
        b: cluster.mount(volume),
        _cluster: cluster,
    }
}

/// Python with the lock modules at hand: `f` is the open file.
fn python(script: &str, path: &Path) -> Command {
    let mut command = Command::new("python3");
    let opening = "import fcntl,os,sys,time\nf=os.open(sys.argv[1],os.O_RDWR)\n";
    command
        .args(["-c", &format!("{opening}{script}")])
        .arg(path);
    command.stdin(Stdio::null());
    command
}

fn succeeds(script: &str, path: &Path) {
    let output = python(script, path).output().unwrap();
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A process that holds a lock until it is killed.
struct Holder(Child);

impl Holder {
    fn of(lock: &str, path: &Path, scratch: &Path) -> Self {
        let mark = scratch.join(format!("held-{}", std::process::id()));
        let _ = fs::remove_file(&mark);
        let script = format!("{lock}\nopen('{}','w')\ntime.sleep(1000)", mark.display());
        let child = python(&script, path).spawn().unwrap();
        wait_for("the lock", Duration::from_secs(30), || {
            mark.exists().then_some(())
        });
        Self(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const REFUSED: &str =
    "\ntry:\n\tLOCK\n\tsys.exit('granted')\nexcept OSError as e: assert e.errno==11, e\n";

fn refused(lock: &str, path: &Path) {
    succeeds(&REFUSED.replace("LOCK", lock), path);
}

#[test]
fn locks_exclude_across_mounts_and_end_with_their_holder() {
    let two = two("locks");
    let scratch = support::scratch();
    fs::write(two.a.join("file"), b"x").unwrap();
    let (here, there) = (two.a.join("file"), two.b.join("file"));
    for (lock, try_lock) in [
        (
            "fcntl.flock(f,fcntl.LOCK_EX)",
            "fcntl.flock(f,fcntl.LOCK_EX|fcntl.LOCK_NB)",
        ),
        (
            "fcntl.lockf(f,fcntl.LOCK_EX)",
            "fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB)",
        ),
    ] {
        let holder = Holder::of(lock, &here, scratch.path());
        refused(try_lock, &here);
        refused(try_lock, &there);
        holder.kill();
        wait_for("the end of the lock", Duration::from_secs(5), || {
            python(try_lock, &there)
                .status()
                .unwrap()
                .success()
                .then_some(())
        });
    }
}

#[test]
fn flock_and_fcntl_locks_ignore_each_other() {
    let two = two("kinds");
    let scratch = support::scratch();
    fs::write(two.a.join("file"), b"x").unwrap();
    let holder = Holder::of(
        "fcntl.flock(f,fcntl.LOCK_EX)",
        &two.a.join("file"),
        scratch.path(),
    );
    succeeds(
        "fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB)",
        &two.a.join("file"),
    );
    succeeds(
        "fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB)",
        &two.b.join("file"),
    );
    // One process may hold both on one file.
    succeeds(
        "fcntl.lockf(f,fcntl.LOCK_EX); fcntl.lockf(f,fcntl.LOCK_UN)",
        &two.b.join("file"),
    );
    holder.kill();
}

#[test]
fn ranges_are_split_and_tested() {
    let two = two("ranges");
    let scratch = support::scratch();
    fs::write(two.a.join("file"), b"x").unwrap();
    let hold = "fcntl.lockf(f,fcntl.LOCK_EX,100,0)\nfcntl.lockf(f,fcntl.LOCK_UN,10,50)\nfcntl.lockf(f,fcntl.LOCK_SH,100,200)";
    let holder = Holder::of(hold, &two.a.join("file"), scratch.path());
    let there = two.b.join("file");
    succeeds("fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,10,50)", &there);
    succeeds("fcntl.lockf(f,fcntl.LOCK_SH|fcntl.LOCK_NB,100,200)", &there);
    refused("fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,1,49)", &there);
    refused("fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,1,60)", &there);
    refused("fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,1,299)", &there);
    // F_GETLK names the lock in the way.
    let getlk = "import struct\n\
        q=struct.pack('hhqqi4x',fcntl.F_WRLCK,0,0,0,0)\n\
        t,w,s,l,p=struct.unpack('hhqqi4x',fcntl.fcntl(f,fcntl.F_GETLK,q))\n\
        assert (t,s,l)==(fcntl.F_WRLCK,0,50),(t,w,s,l,p)\n";
    succeeds(getlk, &there);
    holder.kill();
}

#[test]
fn a_blocked_lock_is_granted_in_time_and_can_be_interrupted() {
    let two = two("blocked");
    let scratch = support::scratch();
    fs::write(two.a.join("file"), b"x").unwrap();
    for kind in ["flock", "lockf"] {
        let lock = format!("fcntl.{kind}(f,fcntl.LOCK_EX)");
        let holder = Holder::of(&lock, &two.a.join("file"), scratch.path());
        let mut waiting = python(&lock, &two.b.join("file")).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert!(
            waiting.try_wait().unwrap().is_none(),
            "it was granted although it is held"
        );
        let began = Instant::now();
        holder.kill();
        assert!(waiting.wait().unwrap().success());
        assert!(
            began.elapsed() < Duration::from_secs(2),
            "{:?}",
            began.elapsed()
        );

        let holder = Holder::of(&lock, &two.a.join("file"), scratch.path());
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            let mut waiting = python(&lock, &two.b.join("file"))
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(500));
            let began = Instant::now();
            kill(Pid::from_raw(waiting.id() as i32), signal).unwrap();
            assert!(!waiting.wait().unwrap().success());
            assert!(
                began.elapsed() < Duration::from_secs(2),
                "{signal} took {:?}",
                began.elapsed()
            );
        }
        holder.kill();
        // Neither of them got it after all.
        let free = format!("fcntl.{kind}(f,fcntl.LOCK_EX|fcntl.LOCK_NB)");
        wait_for("a free lock", Duration::from_secs(5), || {
            python(&free, &two.a.join("file"))
                .status()
                .unwrap()
                .success()
                .then_some(())
        });
    }
}

#[test]
fn a_circle_of_waiting_processes_is_a_deadlock() {
    let two = two("deadlock");
    fs::write(two.a.join("file"), b"x").unwrap();
    let scratch = support::scratch();
    let mark = |name: &str| scratch.path().join(name);
    let script = |mine: u32, other: u32, me: &str, they: &str| {
        format!(
            "fcntl.lockf(f,fcntl.LOCK_EX,1,{mine})\nopen('{}','w')\nwhile not os.path.exists('{}'): time.sleep(0.01)\n\
             try: fcntl.lockf(f,fcntl.LOCK_EX,1,{other})\nexcept OSError as e:\n\tsys.exit(e.errno)\n",
            mark(me).display(),
            mark(they).display()
        )
    };
    let mut first = python(&script(0, 1, "a", "b"), &two.a.join("file"))
        .spawn()
        .unwrap();
    let mut second = python(&script(1, 0, "b", "a"), &two.b.join("file"))
        .spawn()
        .unwrap();
    let codes = [first.wait().unwrap().code(), second.wait().unwrap().code()];
    assert!(
        codes.contains(&Some(35)),
        "EDEADLK for one of them: {codes:?}"
    );
    assert!(
        codes.contains(&Some(0)),
        "and the lock for the other: {codes:?}"
    );
}

#[test]
fn what_was_written_under_a_lock_is_seen_by_the_next_holder() {
    let two = two("handover");
    fs::write(two.a.join("counter"), b"00000000").unwrap();
    let script = "for _ in range(100):\n\
        \tfcntl.lockf(f,fcntl.LOCK_EX)\n\
        \tn=int(os.pread(f,8,0))+1\n\
        \tos.pwrite(f,b'%08d'%n,0)\n\
        \tfcntl.lockf(f,fcntl.LOCK_UN)\n";
    let mut children: Vec<Child> = [&two.a, &two.b, &two.a]
        .iter()
        .map(|mount| python(script, &mount.join("counter")).spawn().unwrap())
        .collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(fs::read(two.b.join("counter")).unwrap(), b"00000300");
    drop(File::open(two.a.join("counter")).unwrap());
}
