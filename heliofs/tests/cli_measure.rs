//! `heliofs summary` and `heliofs bench`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;

use support::Cluster;

#[test]
fn a_summary_shows_where_most_lies_and_adds_up() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("summed", &[]);
    let mount = cluster.mount("summed");
    fs::create_dir_all(mount.join("a/deep")).unwrap();
    fs::create_dir(mount.join("b")).unwrap();
    fs::write(mount.join("a/big"), vec![7; 3 << 20]).unwrap();
    fs::write(mount.join("a/deep/x"), vec![7; 1000]).unwrap();
    for n in 0..20 {
        fs::write(mount.join(format!("b/n{n}")), "0123456789").unwrap();
    }
    let place = mount.path.to_str().unwrap();
    // What was closed a moment ago is stored within a second.
    support::wait_for("the data", std::time::Duration::from_secs(30), || {
        let ran = cluster
            .run(&["summary", place, "--depth", "2", "--entries", "5", "--json"])
            .success()
            .json();
        (ran[0]["stored_bytes"] == (3 << 20) + 1000 + 200).then_some(())
    });
    let all = cluster
        .run(&["summary", place, "--depth", "2", "--entries", "5", "--json"])
        .success()
        .json();
    let top = &all[0];
    assert_eq!(
        (&top["files"], &top["directories"]),
        (&22.into(), &4.into())
    );
    let names = |node: &serde_json::Value| -> Vec<String> {
        let children = node["children"].as_array().unwrap().iter();
        children
            .map(|child| child["path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(top), ["a", "b"], "{top}");
    assert_eq!(names(&top["children"][0]), ["big", "deep"]);
    let many = &top["children"][1];
    assert_eq!(names(many).len(), 5);
    assert_eq!(many["others"]["entries"], 15);
    assert_eq!(many["others"]["stored_bytes"], 150);

    let url = cluster.volume_url("summed");
    let text = cluster.run(&["summary", &url, "/a", "/b/n3"]).success().out;
    assert!(text.contains("3.0 MiB") && text.contains("deep/"), "{text}");
    cluster
        .run(&["summary", &url, "/none"])
        .failure(1, "no such file");
    cluster
        .run(&["summary", &url, "/", "--depth", "99"])
        .failure(2, "too much");
}

#[test]
fn a_bench_measures_and_leaves_nothing() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("fast", &[]);
    let mount = cluster.mount("fast");
    let place = mount.path.to_str().unwrap();
    let ran = cluster
        .run(&[
            "bench",
            place,
            "--big-file-size",
            "9M",
            "--small-file-count",
            "6",
            "--small-file-size",
            "20K",
            "-p",
            "2",
            "--json",
        ])
        .success()
        .json();
    let rows: Vec<_> = ran
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            assert!(row["seconds"].as_f64().unwrap() > 0.0);
            let number = |name: &str| row[name].as_u64().unwrap();
            (
                row["what"].as_str().unwrap(),
                number("operations"),
                number("bytes"),
            )
        })
        .collect();
    assert_eq!(
        rows,
        [
            ("write a large file", 2, 18 << 20),
            ("read a large file", 2, 18 << 20),
            ("write small files", 12, 12 * 20 * 1024),
            ("read small files", 12, 12 * 20 * 1024),
            ("stat files", 12, 0),
        ]
    );
    assert_eq!(fs::read_dir(&mount.path).unwrap().count(), 0);
    cluster
        .run(&["bench", place, "--threads", "0"])
        .failure(2, "out of bounds");
    cluster
        .run(&["bench", "/nowhere/at/all"])
        .failure(1, "cannot create");
}
