//! SeaweedFS: an S3 server with signatures that we did not write.

use std::process::Command;
use std::time::Duration;

use super::{Process, free_ports, scratch, tools, wait_for};

pub const ACCESS_KEY: &str = "test-access";
pub const SECRET_KEY: &str = "test-secret-key";

pub struct S3 {
    pub url: String,
    pub process: Process,
    _scratch: tempfile::TempDir,
}

impl S3 {
    pub fn start() -> Self {
        let program = tools().join("weed/bin/weed");
        assert!(
            program.exists(),
            "{} is missing: run .ci/setup test",
            program.display()
        );
        let scratch = scratch();
        let data = scratch.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let config = scratch.path().join("s3.json");
        let identity = serde_json::json!({ "identities": [{
            "name": "test",
            "credentials": [{ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY }],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }, {
            "name": "reader",
            "credentials": [{ "accessKey": "test-reader", "secretKey": "test-reader-key" }],
            "actions": ["Read", "List"],
        }]});
        std::fs::write(&config, identity.to_string()).unwrap();
        let ports = free_ports(8);
        let log = scratch.path().join("weed.log");
        let mut process = Process::start("weed", &log, &program, |command| {
            command
                .args([
                    "server",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-master.telemetry=false",
                    "-volume.max=50",
                ])
                .args([
                    "-master.volumeSizeLimitMB=256",
                    "-filer",
                    "-s3",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                ])
                .arg(format!("-dir={}", data.display()))
                .arg(format!("-s3.config={}", config.display()));
            for (flag, port) in [
                "master.port",
                "master.port.grpc",
                "volume.port",
                "volume.port.grpc",
                "filer.port",
                "filer.port.grpc",
                "s3.port",
                "s3.port.grpc",
            ]
            .into_iter()
            .zip(&ports)
            {
                command.arg(format!("-{flag}={port}"));
            }
        });
        let url = format!("http://127.0.0.1:{}", ports[6]);
        wait_for("the start of weed", Duration::from_secs(60), || {
            assert!(
                process.ended().is_none(),
                "weed ended:\n{}",
                process.log_tail()
            );
            let answer =
                super::cluster::run(Command::new("curl").args(["-s", "-o", "/dev/null", &url]));
            (answer.code == 0).then_some(())
        });
        Self {
            url,
            process,
            _scratch: scratch,
        }
    }

    pub fn bucket_url(&self, bucket: &str) -> String {
        format!("{}/{bucket}", self.url)
    }

    /// The right keys, in the environment.
    pub fn keys(&self, command: &mut Command) {
        command
            .env("ACCESS_KEY", ACCESS_KEY)
            .env("SECRET_KEY", SECRET_KEY);
    }
}
