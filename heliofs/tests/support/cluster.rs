//! Metadata nodes as processes, each with a directory of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Lan, Mount, Process, S3, free_ports, scratch, wait_for};

/// The command under test.
pub const HELIOFS: &str = env!("CARGO_BIN_EXE_heliofs");

/// What a command left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn success(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    /// An error as users are promised: `error: …` that contains `message`, and a hint.
    pub fn failure(self, code: i32, message: &str) -> Self {
        assert_eq!(
            self.code, code,
            "stdout: {}\nstderr: {}",
            self.out, self.err
        );
        assert!(self.err.contains("error: "), "no error line: {}", self.err);
        assert!(
            self.err.contains(message),
            "`{message}` is not in: {}",
            self.err
        );
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

pub struct Node {
    pub id: u64,
    pub host: String,
    pub port: u16,
    /// Flags of `nsenter` for the network that its process runs in; `None`: the host's.
    pub network: Option<String>,
    pub data_dir: PathBuf,
    pub process: Option<Process>,
}

impl Node {
    /// `host:port`
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The META-URL of this node alone.
    pub fn url(&self) -> String {
        format!("helio://{}", self.address())
    }
}

pub struct Cluster {
    pub nodes: Vec<Node>,
    pub directory: PathBuf,
    pub token_file: PathBuf,
    /// More flags for every node.
    pub flags: Vec<String>,
    _scratch: tempfile::TempDir,
}

impl Cluster {
    /// Three nodes in directories.
    pub fn start() -> Self {
        Self::with_dirs(3, |_, _| None, &[])
    }

    /// `count` nodes; `place` may put the data directory of node `id` elsewhere.
    pub fn with_dirs(
        count: usize,
        place: impl Fn(u64, &Path) -> Option<PathBuf>,
        flags: &[&str],
    ) -> Self {
        Self::build(count, place, None, flags)
    }

    /// A node on each host of a network whose links can be cut. The network must outlive the cluster.
    pub fn in_lan(lan: &Lan, flags: &[&str]) -> Self {
        Self::build(lan.len(), |_, _| None, Some(lan), flags)
    }

    fn build(
        count: usize,
        place: impl Fn(u64, &Path) -> Option<PathBuf>,
        lan: Option<&Lan>,
        flags: &[&str],
    ) -> Self {
        super::spawner::ready();
        let scratch = scratch();
        let directory = scratch.path().to_owned();
        let token_file = directory.join("token");
        fs::write(&token_file, "0123456789abcdef0123456789abcdef\n").unwrap();
        fs::set_permissions(&token_file, fs::Permissions::from_mode(0o600)).unwrap();
        let nodes = free_ports(count)
            .into_iter()
            .zip(1..)
            .map(|(port, id)| {
                let own = directory.join(format!("node-{id}"));
                let data_dir = place(id, &own).unwrap_or(own);
                let index = id as usize - 1;
                Node {
                    id,
                    host: lan.map_or_else(|| "127.0.0.1".to_owned(), |lan| lan.address(index)),
                    port,
                    network: lan.map(|lan| lan.inside(index)),
                    data_dir,
                    process: None,
                }
            })
            .collect();
        let mut cluster = Self {
            nodes,
            directory,
            token_file,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            _scratch: scratch,
        };
        for index in 0..count {
            cluster.start_node(index);
        }
        let first = cluster.nodes[0].url();
        cluster.run(&["raft", "init", &first]).success();
        for index in 1..count {
            let node = &cluster.nodes[index];
            let (id, address) = (node.id.to_string(), node.address());
            cluster
                .run(&["raft", "add", &first, &id, &address])
                .success();
        }
        cluster.leader();
        cluster
    }

    /// Starts node `index` (from 0) and waits until it answers.
    pub fn start_node(&mut self, index: usize) {
        self.spawn_node(index);
        let url = self.nodes[index].url();
        let id = self.nodes[index].id;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if self.run(&["raft", "status", &url]).code == 0 {
                return;
            }
            let process = self.nodes[index].process.as_mut().unwrap();
            if let Some(status) = process.ended() {
                panic!(
                    "node {id} ended ({status}) instead of starting:\n{}",
                    process.log_tail()
                );
            }
            assert!(Instant::now() < deadline, "node {id} does not answer");
        }
    }

    /// Starts node `index` without waiting for anything.
    pub fn spawn_node(&mut self, index: usize) {
        let node = &self.nodes[index];
        let log = self.directory.join(format!("node-{}.log", node.id));
        let program = match &node.network {
            Some(_) => "nsenter",
            None => HELIOFS,
        };
        let process = Process::start(
            &format!("node {}", node.id),
            &log,
            Path::new(program),
            |command| {
                if let Some(network) = &node.network {
                    // It becomes the program: same process id.
                    command.args([network, HELIOFS]);
                }
                command
                    .args(["meta", "--id", &node.id.to_string()])
                    .arg("--data-dir")
                    .arg(&node.data_dir)
                    .args(["--listen", &node.address()])
                    .arg("--token-file")
                    .arg(&self.token_file)
                    .args(&self.flags);
            },
        );
        self.nodes[index].process = Some(process);
    }

    /// SIGKILL.
    pub fn kill_node(&mut self, index: usize) {
        if let Some(mut process) = self.nodes[index].process.take() {
            process.kill();
        }
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop_node(&mut self, index: usize) {
        if let Some(mut process) = self.nodes[index].process.take() {
            process.signal(nix::sys::signal::Signal::SIGTERM);
            let status = process.wait(Duration::from_secs(30));
            assert!(
                status.success(),
                "a stopped node ended with {status}:\n{}",
                process.log_tail()
            );
        }
    }

    /// The META-URL of all nodes.
    pub fn url(&self) -> String {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.url_of(&all)
    }

    /// The META-URL of some nodes, by index.
    pub fn url_of(&self, nodes: &[usize]) -> String {
        let peers: Vec<_> = nodes
            .iter()
            .map(|index| self.nodes[*index].address())
            .collect();
        format!("helio://{}", peers.join(","))
    }

    /// The META-URL of a volume.
    pub fn volume_url(&self, volume: &str) -> String {
        format!("{}/{volume}", self.url())
    }

    /// Runs `heliofs` with the cluster's token.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, |_| {})
    }

    pub fn run_with(&self, arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Ran {
        let mut command = Command::new(HELIOFS);
        command
            .args(arguments)
            .env("HELIOFS_TOKEN_FILE", &self.token_file);
        prepare(&mut command);
        run(&mut command)
    }

    pub fn status(&self) -> Value {
        self.run(&["status", &self.url(), "--json"])
            .success()
            .json()
    }

    /// The volume as `heliofs status` shows it.
    pub fn volume(&self, name: &str) -> Value {
        let status = self.status();
        let volumes = status["volumes"].as_array().unwrap();
        volumes
            .iter()
            .find(|volume| volume["name"] == name)
            .unwrap()
            .clone()
    }

    /// Waits for a leader; its index, from 0.
    pub fn leader(&self) -> usize {
        wait_for("an election", Duration::from_secs(30), || {
            let ran = self.run(&["raft", "status", &self.url(), "--json"]);
            let id = (ran.code == 0)
                .then(|| ran.json()["leader"].as_u64())
                .flatten()?;
            self.nodes.iter().position(|node| node.id == id)
        })
    }

    /// Another node than the leader.
    pub fn follower(&self) -> usize {
        (self.leader() + 1) % self.nodes.len()
    }

    /// A volume whose bucket is a directory.
    pub fn format_file(&self, name: &str, more: &[&str]) {
        let bucket = self.directory.join("bucket");
        let url = self.url();
        let mut arguments = vec![
            "format",
            &url,
            name,
            "--storage",
            "file",
            "--bucket",
            bucket.to_str().unwrap(),
        ];
        arguments.extend(more);
        self.run(&arguments).success();
    }

    /// A volume in a bucket of a real S3 server.
    pub fn format_s3(&self, name: &str, s3: &S3, more: &[&str]) {
        let url = self.url();
        let bucket = s3.bucket_url(name);
        let mut arguments = vec!["format", &url, name, "--storage", "s3", "--bucket", &bucket];
        arguments.extend(more);
        self.run_with(&arguments, |command| s3.keys(command))
            .success();
    }

    pub fn mount(&self, volume: &str) -> Mount {
        Mount::of(self, volume, &[])
    }

    /// Waits until all nodes that run have applied the same position of `volume` with the same digest.
    pub fn assert_replicas_equal(&self, volume: &str) {
        let url = self.volume_url(volume);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let ran = self.run(&["raft", "digest", &url, "--json"]);
            if ran.code == 0 {
                let nodes = ran.json();
                let nodes = nodes.as_array().unwrap();
                assert!(
                    nodes.iter().all(|node| node["diverged"].is_null()),
                    "replicas diverged: {nodes:?}"
                );
                let all_answer = nodes.len() == self.nodes.len()
                    && nodes.iter().all(|node| node["digest"].is_string());
                let same = |key: &str| nodes.iter().all(|node| node[key] == nodes[0][key]);
                if all_answer && same("position") && same("digest") {
                    return;
                }
            }
            assert!(
                Instant::now() < deadline,
                "the replicas are not equal: {} {}",
                ran.out,
                ran.err
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ran {
    let (code, out, err) = super::spawner::run(command);
    Ran {
        code,
        out: String::from_utf8_lossy(&out).into_owned(),
        err: String::from_utf8_lossy(&err).into_owned(),
    }
}
