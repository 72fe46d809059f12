//! A network for nodes: one network namespace a host, joined by a bridge, each reachable from the test. Links between any two
//! hosts can be cut and healed; packets then vanish, as behind a broken switch.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::cluster::run;

/// Networks of this process so far: two tests of one process must not share one.
static COUNT: AtomicU32 = AtomicU32::new(0);

pub struct Lan {
    /// Begins the names of everything that belongs to it.
    tag: String,
    /// First three bytes of its addresses.
    prefix: String,
    hosts: usize,
}

fn must(program: &str, arguments: &[&str]) -> String {
    let ran = run(Command::new(program).args(arguments));
    assert_eq!(ran.code, 0, "{program} {arguments:?}: {}", ran.err);
    ran.out
}

impl Lan {
    /// Needs root, ip and nft.
    pub fn new(hosts: usize) -> Self {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        // Process ids of tests that run at the same time are close to each other: these differ.
        let lan = Self {
            tag: format!("hl{process}{count}"),
            prefix: format!(
                "10.{}.{}",
                100 + (process / 250 + count) % 100,
                process % 250
            ),
            hosts,
        };
        let bridge = lan.bridge();
        must("ip", &["link", "add", &bridge, "type", "bridge"]);
        let own = format!("{}.254/24", lan.prefix);
        must("ip", &["addr", "add", &own, "dev", &bridge]);
        must("ip", &["link", "set", &bridge, "up"]);
        for host in 0..hosts {
            let namespace = lan.namespace(host);
            let (outside, address) = (lan.outside(host), format!("{}/24", lan.address(host)));
            must("ip", &["netns", "add", &namespace]);
            let pair = [
                "link", "add", &outside, "type", "veth", "peer", "name", "eth0",
            ];
            must("ip", &[&pair[..], &["netns", &namespace]].concat());
            must("ip", &["link", "set", &outside, "master", &bridge, "up"]);
            let inside = ["-n", &namespace];
            for command in [
                &["addr", "add", &address, "dev", "eth0"][..],
                &["link", "set", "eth0", "up"],
                &["link", "set", "lo", "up"],
            ] {
                must("ip", &[&inside[..], command].concat());
            }
            lan.nft(host, &["add", "table", "inet", "cuts"]);
            let hook = "{ type filter hook input priority 0 ; }";
            lan.nft(host, &["add", "chain", "inet", "cuts", "in", hook]);
        }
        lan
    }

    fn bridge(&self) -> String {
        format!("{}b", self.tag)
    }

    /// The end of the host's link that is on the bridge.
    fn outside(&self, host: usize) -> String {
        format!("{}v{host}", self.tag)
    }

    pub fn len(&self) -> usize {
        self.hosts
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}n{host}", self.tag)
    }

    pub fn address(&self, host: usize) -> String {
        format!("{}.{}", self.prefix, host + 1)
    }

    fn nft(&self, host: usize, arguments: &[&str]) -> String {
        let inside = self.inside(host);
        must("nsenter", &[&[&inside[..], "nft"], arguments].concat())
    }

    /// What makes `nsenter` run a command on the host. Not `ip netns exec`: that gives it a mount namespace of its own, with
    /// copies of the test's mounts, which then outlive their umount.
    pub fn inside(&self, host: usize) -> String {
        format!("--net=/var/run/netns/{}", self.namespace(host))
    }

    /// From now on nothing gets from either host to the other.
    pub fn cut(&self, one: usize, other: usize) {
        for (at, from) in [(one, other), (other, one)] {
            let from = self.address(from);
            let rule = ["ip", "saddr", &from, "counter", "drop"];
            self.nft(
                at,
                &[&["add", "rule", "inet", "cuts", "in"], &rule[..]].concat(),
            );
        }
    }

    /// Cuts `host` off from all other hosts; the test still reaches it.
    pub fn isolate(&self, host: usize) {
        for other in (0..self.hosts).filter(|other| *other != host) {
            self.cut(host, other);
        }
    }

    /// Packets that vanished since the last heal: a fault that hit nothing proves nothing.
    pub fn dropped(&self) -> u64 {
        let mut sum = 0;
        for host in 0..self.hosts {
            let listing = self.nft(host, &["-j", "list", "table", "inet", "cuts"]);
            let listing: serde_json::Value = serde_json::from_str(&listing).unwrap();
            let items = listing["nftables"].as_array().unwrap();
            sum += items
                .iter()
                .filter_map(|item| item["rule"]["expr"].as_array())
                .flatten()
                .filter_map(|expression| expression["counter"]["packets"].as_u64())
                .sum::<u64>();
        }
        sum
    }

    /// All links are whole again.
    pub fn heal(&self) {
        for host in 0..self.hosts {
            self.nft(host, &["flush", "chain", "inet", "cuts", "in"]);
        }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        // What was not made, because making it failed, can't be removed: that is no second failure.
        for host in 0..self.hosts {
            // A namespace lives on while the kernel tries to end connections of killed processes; its link must not.
            run(Command::new("ip").args(["link", "del", &self.outside(host)]));
            run(Command::new("ip").args(["netns", "del", &self.namespace(host)]));
        }
        run(Command::new("ip").args(["link", "del", &self.bridge()]));
    }
}
