//! Two mounts that answer changes of names ahead of the cluster, look into each other's directories at random moments, and are
//! frozen, while leaders are killed and fall silent. Every directory's history of names is recorded; whatever anybody lists must be
//! one of its states, and none before what was synced or seen by another mount.
//!
//! `HELIOFS_SOAK_SECONDS` sets how long (20), `HELIOFS_SOAK_SEED` what happens.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Cluster, Mount, wait_for};

const VOLUME: &str = "soak";

/// Threads that change trees of their own, per mount.
const WORKERS: usize = 2;

/// Names in a directory at most: one page of a listing, which shows one moment.
const NAMES: usize = 8;

/// Changes in a tree before another one is begun.
const CHANGES: usize = 400;

/// After a change, others may see what was before for as long as it takes to tell them, through a change of leader.
const LAG: Duration = Duration::from_secs(20);

/// What is in a directory; `None`: it does not exist.
type Names = Option<BTreeSet<String>>;

/// The states that one directory went through, in order; the last may not be reached yet.
struct History {
    /// Below the volume's root.
    path: PathBuf,
    /// The mount that made it.
    owner: usize,
    states: Vec<Names>,
    /// Nobody may see a state before this one any more.
    least: usize,
    /// A change of it failed: whatever was not synced may be lost, and the owner leaves it alone.
    dead: bool,
    /// Contents of its files that were synced and not changed since.
    synced: BTreeMap<String, String>,
}

impl History {
    fn last(&self) -> &Names {
        self.states.last().expect("it begins with one")
    }

    /// The first state from `from` on that is this one.
    fn find(&self, from: usize, names: &Names) -> Option<usize> {
        let found = self.states[from..].iter().position(|state| state == names);
        found.map(|at| from + at)
    }

    /// Whether a listing that went on while the directory went through the states from `from` on may show this: what was there all
    /// the time, and nothing that never was.
    fn may_show(&self, from: usize, names: &Names) -> bool {
        // The first is that it does not exist.
        let from = from.max(1).min(self.states.len());
        let states: Option<Vec<_>> = self.states[from..].iter().map(Option::as_ref).collect();
        let (Some(states), Some(names)) = (states, names) else {
            return false;
        };
        if states.is_empty() {
            return false;
        }
        let always = |name: &String| states.iter().all(|state| state.contains(name));
        let ever = |name: &String| states.iter().any(|state| state.contains(name));
        states[0]
            .iter()
            .all(|name| !always(name) || names.contains(name))
            && names.iter().all(ever)
    }
}

type Shared = Arc<Mutex<History>>;

/// Everything that there is.
struct World {
    roots: [PathBuf; 2],
    all: Mutex<Vec<Shared>>,
    stop: AtomicBool,
    trees: AtomicU64,
    changes: AtomicU64,
    looks: AtomicU64,
    synced: AtomicU64,
    failed: AtomicU64,
}

fn list(path: &Path) -> io::Result<Names> {
    match fs::read_dir(path) {
        Ok(entries) => {
            let names = entries.map(|entry| Ok(entry?.file_name().into_string().unwrap()));
            names.collect::<io::Result<_>>().map(Some)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// It was removed between two steps of a look, or the cluster did not answer in time: look again.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ESTALE | libc::EIO | libc::ENOENT)
    )
}

impl World {
    /// A directory of which this thread records the history; it does not exist yet.
    fn begin(&self, path: PathBuf, owner: usize) -> Shared {
        let history = Arc::new(Mutex::new(History {
            path,
            owner,
            states: vec![None],
            least: 0,
            dead: false,
            synced: BTreeMap::new(),
        }));
        self.all.lock().unwrap().push(history.clone());
        history
    }

    /// Makes a change of these directories' names, of which `names` says what becomes of them. `false`: it failed.
    fn change(
        &self,
        directories: &[&Shared],
        names: impl Fn(usize, &mut Names),
        make: impl FnOnce() -> io::Result<()>,
    ) -> bool {
        for (at, directory) in directories.iter().enumerate() {
            let mut history = directory.lock().unwrap();
            let mut next = history.last().clone();
            names(at, &mut next);
            // From before it is made: somebody may see it at once.
            history.states.push(next);
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        let made = make();
        if let Err(error) = &made {
            self.failed.fetch_add(1, Ordering::Relaxed);
            for directory in directories {
                let mut history = directory.lock().unwrap();
                println!("{:?} is given up: {error}", history.path);
                history.dead = true;
            }
        }
        made.is_ok()
    }

    /// One worker's trees, one after the other.
    fn work(&self, mount: usize, mut rng: StdRng) {
        while !self.stop.load(Ordering::Relaxed) {
            self.work_on_a_tree(mount, &mut rng);
        }
    }

    fn work_on_a_tree(&self, mount: usize, rng: &mut StdRng) {
        let root = &self.roots[mount];
        let number = self.trees.fetch_add(1, Ordering::Relaxed);
        let mut directories: Vec<Shared> = Vec::new();
        let below = PathBuf::from(format!("t{number}"));
        for path in [below.clone(), below.join("a"), below.join("b")] {
            let directory = self.begin(path.clone(), mount);
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let mut concerned = vec![&directory];
            concerned.extend(directories.first());
            let names = |at, names: &mut Names| match at {
                0 => *names = Some(BTreeSet::new()),
                _ => {
                    names.as_mut().unwrap().insert(name.clone());
                }
            };
            if !self.change(&concerned, names, || fs::create_dir(root.join(&path))) {
                return;
            }
            directories.push(directory);
        }
        for n in 0..CHANGES {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let directory = &directories[rng.random_range(0..directories.len())];
            let (path, dead, names) = {
                let history = directory.lock().unwrap();
                let names: Vec<String> = history.last().iter().flatten().cloned().collect();
                (history.path.clone(), history.dead, names)
            };
            if dead {
                if path == below {
                    return;
                }
                continue;
            }
            self.step(root, directory, (&path, names), &directories, (n, rng));
        }
    }

    fn step(
        &self,
        root: &Path,
        directory: &Shared,
        (path, names): (&Path, Vec<String>),
        all: &[Shared],
        (n, rng): (usize, &mut StdRng),
    ) {
        let files: Vec<&String> = names.iter().filter(|name| name.starts_with('f')).collect();
        let subs: Vec<&String> = names.iter().filter(|name| name.starts_with('x')).collect();
        let file = (!files.is_empty()).then(|| files[rng.random_range(0..files.len())].clone());
        match (rng.random_range(0..100), file) {
            (0..35, _) if names.len() < NAMES => {
                let name = format!("f{n}");
                let full = root.join(path).join(&name);
                let text = format!("{n} ");
                let empty = rng.random_bool(0.4);
                let made = self.change(
                    &[directory],
                    |_, names| {
                        names.as_mut().unwrap().insert(name.clone());
                    },
                    || {
                        let mut file = OpenOptions::new()
                            .write(true)
                            .create_new(true)
                            .open(&full)?;
                        match empty {
                            true => Ok(()),
                            false => file.write_all(text.as_bytes()),
                        }
                    },
                );
                if made && rng.random_bool(0.15) {
                    let text = if empty { String::new() } else { text };
                    self.sync_file(directory, &full, (name, text));
                }
            }
            (35..45, _) if names.len() < NAMES => {
                let name = format!("x{n}");
                self.change(
                    &[directory],
                    |_, names| {
                        names.as_mut().unwrap().insert(name.clone());
                    },
                    || fs::create_dir(root.join(path).join(&name)),
                );
            }
            (45..55, _) if !subs.is_empty() => {
                let name = subs[0];
                self.change(
                    &[directory],
                    |_, names| {
                        names.as_mut().unwrap().remove(name);
                    },
                    || fs::remove_dir(root.join(path).join(name)),
                );
            }
            (55..80, Some(file)) => self.rename(root, directory, &file, all, rng),
            (80..92, Some(file)) => {
                directory.lock().unwrap().synced.remove(&file);
                self.change(
                    &[directory],
                    |_, names| {
                        names.as_mut().unwrap().remove(&file);
                    },
                    || fs::remove_file(root.join(path).join(&file)),
                );
            }
            (92..95, _) => self.sync_directory(directory, root),
            // Whoever made it sees exactly what it did.
            _ => {
                let Ok(seen) = list(&root.join(path)) else {
                    return;
                };
                let history = directory.lock().unwrap();
                // After a loss there is what others see.
                if seen != *history.last() && history.find(history.least, &seen).is_none() {
                    panic!("{path:?} is {seen:?} and not {:?}", history.last());
                }
            }
        }
    }

    /// Of a file: within the directory or to another one, where it may replace one.
    fn rename(&self, root: &Path, from: &Shared, file: &str, all: &[Shared], rng: &mut StdRng) {
        let to = &all[rng.random_range(0..all.len())];
        let same = Arc::ptr_eq(from, to);
        let (target, dead, full) = {
            let history = to.lock().unwrap();
            let files: Vec<&String> = history
                .last()
                .iter()
                .flatten()
                .filter(|name| name.starts_with('f') && *name != file)
                .collect();
            let full = history.last().as_ref().is_none_or(|n| n.len() >= NAMES);
            let target = match files.is_empty() || rng.random_bool(0.5) {
                true => format!("{file}r"),
                false => files[rng.random_range(0..files.len())].clone(),
            };
            (target, history.dead, full && files.is_empty())
        };
        if dead || full || target.len() > 24 {
            return;
        }
        let source = root.join(&from.lock().unwrap().path).join(file);
        let destination = root.join(&to.lock().unwrap().path).join(&target);
        to.lock().unwrap().synced.remove(&target);
        let content = from.lock().unwrap().synced.remove(file);
        let concerned = if same { vec![from] } else { vec![from, to] };
        let renamed = self.change(
            &concerned,
            |at, names| {
                let names = names.as_mut().unwrap();
                if at == 0 {
                    names.remove(file);
                }
                if at == 1 || same {
                    names.insert(target.clone());
                }
            },
            || fs::rename(&source, &destination),
        );
        if renamed
            && let Some(text) = content
            && rng.random_bool(0.3)
        {
            self.sync_file(to, &destination, (target, text));
        }
    }

    fn sync_file(&self, directory: &Shared, full: &Path, (name, text): (String, String)) {
        let synced = File::open(full).and_then(|file| file.sync_all());
        match synced {
            Ok(()) => {
                self.synced.fetch_add(1, Ordering::Relaxed);
                directory.lock().unwrap().synced.insert(name, text);
            }
            Err(error) => self.give_up(directory, &error),
        }
    }

    fn sync_directory(&self, directory: &Shared, root: &Path) {
        let (path, reached) = {
            let history = directory.lock().unwrap();
            (root.join(&history.path), history.states.len() - 1)
        };
        match File::open(path).and_then(|directory| directory.sync_all()) {
            Ok(()) => {
                self.synced.fetch_add(1, Ordering::Relaxed);
                let mut history = directory.lock().unwrap();
                history.least = history.least.max(reached);
            }
            Err(error) => self.give_up(directory, &error),
        }
    }

    fn give_up(&self, directory: &Shared, error: &io::Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut history = directory.lock().unwrap();
        println!("{:?} is given up: fsync: {error}", history.path);
        history.dead = true;
    }

    /// Looks at a directory through a mount. It must be in a state that it went through, and soon in none before `least`.
    fn look(&self, mount: usize, directory: &Shared) {
        let (path, least, own) = {
            let history = directory.lock().unwrap();
            let path = self.roots[mount].join(&history.path);
            (path, history.least, history.owner == mount)
        };
        let since = Instant::now();
        loop {
            // The last change may not have been made yet.
            let begun = directory.lock().unwrap().states.len().saturating_sub(2);
            let seen = match list(&path) {
                Ok(seen) => seen,
                Err(error) if is_passing(&error) && since.elapsed() < 2 * LAG => continue,
                Err(error) => panic!("{path:?}: {error}"),
            };
            let mut history = directory.lock().unwrap();
            if let Some(at) = history.find(least, &seen) {
                if mount != history.owner {
                    // What another mount has seen stays.
                    history.least = history.least.max(at);
                }
                break;
            }
            if history.may_show(begun, &seen) {
                // Listings and changes go on beside each other, as in any file system.
                break;
            }
            let before = history
                .find(0, &seen)
                .or_else(|| history.may_show(0, &seen).then_some(0));
            let why = match before {
                None => "was never",
                Some(_) => "is no more",
            };
            assert!(
                before.is_some() && since.elapsed() < LAG,
                "{path:?} (own: {own}) shows {seen:?}, which it {why}; at least {least}: {:?}",
                &history.states[least.saturating_sub(3)..],
            );
            drop(history);
            thread::sleep(Duration::from_millis(10));
        }
        self.looks.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads a synced file through a mount.
    fn read(&self, mount: usize, directory: &Shared) {
        let (path, known) = {
            let history = directory.lock().unwrap();
            let known = history.synced.iter().next_back();
            let known = known.map(|(name, text)| (name.clone(), text.clone()));
            (self.roots[mount].join(&history.path), known)
        };
        let Some((name, text)) = known else {
            return;
        };
        let since = Instant::now();
        loop {
            let read = fs::read_to_string(path.join(&name));
            let unchanged = directory.lock().unwrap().synced.get(&name) == Some(&text);
            if !unchanged || read.as_ref().is_ok_and(|read| *read == text) {
                return;
            }
            assert!(
                since.elapsed() < LAG,
                "{path:?}/{name} holds {read:?} and not {text:?}, which was synced"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Looks around at the other mount's directories, mostly the newest.
    fn watch(&self, mount: usize, mut rng: StdRng) {
        while !self.stop.load(Ordering::Relaxed) {
            let chosen = {
                let all = self.all.lock().unwrap();
                let from = match rng.random_bool(0.8) {
                    true => all.len().saturating_sub(12),
                    false => 0,
                };
                (from < all.len()).then(|| all[rng.random_range(from..all.len())].clone())
            };
            if let Some(directory) = chosen {
                match rng.random_bool(0.7) {
                    true => self.look(mount, &directory),
                    false => self.read(mount, &directory),
                }
            }
            // Directories are to stay alone for a while, too.
            thread::sleep(Duration::from_millis(rng.random_range(1..120)));
        }
    }
}

/// Kills and freezes until the time is over.
fn faults(cluster: &mut Cluster, mounts: &[&Mount], rng: &mut StdRng, until: Instant) {
    while Instant::now() < until {
        thread::sleep(Duration::from_millis(rng.random_range(300..1500)));
        let time = Duration::from_millis(rng.random_range(200..2500));
        match rng.random_range(0..10) {
            0..4 => {
                let leader = cluster.leader();
                println!("leader {leader} is killed for {time:?}");
                cluster.kill_node(leader);
                thread::sleep(time);
                cluster.start_node(leader);
            }
            4..7 => {
                let leader = cluster.leader();
                println!("leader {leader} falls silent for {time:?}");
                let process = cluster.nodes[leader].process.as_ref().unwrap();
                process.signal(Signal::SIGSTOP);
                thread::sleep(time);
                process.signal(Signal::SIGCONT);
            }
            7..9 => {
                let mount = rng.random_range(0..mounts.len());
                // So long that its session is over when somebody waits for what it has.
                let time = if rng.random_bool(0.2) { 3 * time } else { time };
                println!("mount {mount} is frozen for {time:?}");
                mounts[mount].process.signal(Signal::SIGSTOP);
                thread::sleep(time);
                mounts[mount].process.signal(Signal::SIGCONT);
            }
            _ => {
                // Both at once: who comes back late must not change what others have seen.
                let leader = cluster.leader();
                let mount = rng.random_range(0..mounts.len());
                println!("leader {leader} is killed while mount {mount} is frozen for {time:?}");
                mounts[mount].process.signal(Signal::SIGSTOP);
                cluster.kill_node(leader);
                thread::sleep(time);
                mounts[mount].process.signal(Signal::SIGCONT);
                cluster.start_node(leader);
            }
        }
    }
}

#[test]
fn what_was_synced_or_seen_stays_and_nothing_else_is_ever_seen() {
    let setting = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |value| value.parse().unwrap())
    };
    let seconds = setting("HELIOFS_SOAK_SECONDS", 20);
    let seed = setting("HELIOFS_SOAK_SEED", rand::random());
    println!("HELIOFS_SOAK_SEED={seed}");
    let mut cluster = Cluster::with_dirs(3, |_, _| None, &[]);
    cluster.format_file(VOLUME, &["--trash-days", "0"]);
    let mounts = [0, 1].map(|_| Mount::of(&cluster, VOLUME, &["--dir-ahead"]));
    let world = World {
        roots: [mounts[0].path.clone(), mounts[1].path.clone()],
        all: Mutex::default(),
        stop: AtomicBool::new(false),
        trees: AtomicU64::new(0),
        changes: AtomicU64::new(0),
        looks: AtomicU64::new(0),
        synced: AtomicU64::new(0),
        failed: AtomicU64::new(0),
    };
    let rng = |number: u64| StdRng::seed_from_u64(seed.wrapping_add(number));
    thread::scope(|scope| {
        let world = &world;
        for mount in 0..2 {
            for worker in 0..WORKERS {
                let rng = rng(1 + (mount * WORKERS + worker) as u64);
                scope.spawn(move || world.work(mount, rng));
            }
            let rng = rng(100 + mount as u64);
            scope.spawn(move || world.watch(mount, rng));
        }
        let until = Instant::now() + Duration::from_secs(seconds);
        let [a, b] = &mounts;
        faults(&mut cluster, &[a, b], &mut rng(0), until);
        world.stop.store(true, Ordering::Relaxed);
    });

    let all = world.all.into_inner().unwrap();
    let all: Vec<History> = all
        .into_iter()
        .map(|history| Arc::into_inner(history).unwrap().into_inner().unwrap())
        .collect();
    let dead = all.iter().filter(|history| history.dead).count();
    println!(
        "{:?} trees, {dead} of {} directories given up; {:?} changes, {:?} failed; {:?} looks, {:?} fsyncs",
        world.trees,
        all.len(),
        world.changes,
        world.failed,
        world.looks,
        world.synced
    );
    // Everything that was answered is to be there, unless fsync says that it is lost.
    let mut lost = 0;
    let mut expected = Vec::new();
    for history in all {
        let path = world.roots[history.owner].join(&history.path);
        let synced = File::open(&path).and_then(|directory| directory.sync_all());
        let exact = synced.is_ok() && !history.dead;
        lost += usize::from(!exact && !history.dead);
        expected.push((history, exact));
    }
    println!("{lost} more are lost as far as fsync says");
    let fresh = Mount::of(&cluster, VOLUME, &["--dir-ahead"]);
    for root in [&world.roots[0], &world.roots[1], &fresh.path] {
        for (history, exact) in &expected {
            let path = root.join(&history.path);
            let from = match exact {
                true => history.states.len() - 1,
                false => history.least,
            };
            wait_for("a state that is allowed", LAG, || {
                let seen = list(&path).ok()?;
                let found = history.find(from, &seen);
                if found.is_none() {
                    println!(
                        "{path:?} is {seen:?}, and not {:?}",
                        &history.states[from..]
                    );
                }
                found
            });
            for (name, text) in history.synced.iter().filter(|_| *exact) {
                assert_eq!(
                    &fs::read_to_string(path.join(name)).unwrap(),
                    text,
                    "{path:?}/{name}"
                );
            }
        }
    }
    let looked = |root: &Path| -> Vec<_> {
        let all = expected.iter();
        all.map(|(history, _)| list(&root.join(&history.path)).unwrap())
            .collect()
    };
    let seen = looked(&fresh.path);
    assert_eq!(seen, looked(&world.roots[0]));
    assert_eq!(seen, looked(&world.roots[1]));
    fresh.unmount();
    for mut mount in mounts {
        let unmounted = support::cluster::run(
            std::process::Command::new(support::cluster::HELIOFS)
                .arg("umount")
                .arg(&mount.path),
        );
        let ended = mount.process.wait(Duration::from_secs(60));
        let log = mount.process.log();
        // Lost is only what a mount had not sent that came back late to a new leader.
        assert!(!log.contains("the cluster refuses"), "{log}");
        let lost = log.contains("did not take effect");
        println!(
            "unmounted: {}, {ended}; lost anything: {lost}",
            unmounted.code
        );
        assert!(lost || unmounted.code == 0 && ended.success(), "{log}");
    }
    let url = cluster.volume_url(VOLUME);
    cluster.run(&["fsck", &url, "--level", "meta"]).success();
    cluster.assert_replicas_equal(VOLUME);
    let log = cluster.run(&["changelog", &cluster.url(), VOLUME, "--json"]);
    let batches = log
        .success()
        .out
        .lines()
        .filter(|line| line.contains("\"batch\""))
        .count();
    println!("{batches} batches");
    assert!(batches as u64 > seconds, "nothing was answered ahead");
}
