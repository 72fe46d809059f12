//! Replies that get lost: nftables drops what a port sends, on loopback.

use std::process::Command;

use super::cluster::run;

pub struct LostReplies {
    table: String,
}

fn nft(arguments: &[&str]) -> bool {
    run(Command::new("nft").args(arguments)).code == 0
}

impl LostReplies {
    /// From now on nothing that `port` sends arrives; what is sent to it does.
    pub fn from_port(port: u16) -> Self {
        let table = format!("heliofs_test_{}_{port}", std::process::id());
        assert!(
            nft(&["add", "table", "inet", &table]),
            "nft is missing or refused"
        );
        let lost = Self { table };
        let hook = "{ type filter hook output priority 0 ; }";
        assert!(nft(&["add", "chain", "inet", &lost.table, "out", hook]));
        let port = port.to_string();
        assert!(nft(&[
            "add",
            "rule",
            "inet",
            &lost.table,
            "out",
            "tcp",
            "sport",
            &port,
            "counter",
            "drop"
        ]));
        lost
    }

    /// Packets dropped so far: a fault that hit nothing proves nothing.
    pub fn dropped(&self) -> u64 {
        let listing = run(Command::new("nft").args(["-j", "list", "table", "inet", &self.table]))
            .success()
            .json();
        let expressions = listing["nftables"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|item| item["rule"]["expr"].as_array());
        expressions
            .flatten()
            .filter_map(|expression| expression["counter"]["packets"].as_u64())
            .sum()
    }
}

impl Drop for LostReplies {
    fn drop(&mut self) {
        nft(&["delete", "table", "inet", &self.table]);
    }
}
