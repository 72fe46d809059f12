//! Volumes with codecs, end to end: what is written is read, nothing readable lies in an encrypted volume's bucket or cache,
//! and without the passphrase nothing is mounted.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use support::{Cluster, Mount, S3};

const WORDS: &[u8] = b"To be, or not to be, that is the question. ";

fn prose(length: usize) -> Vec<u8> {
    WORDS.iter().copied().cycle().take(length).collect()
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

fn secret_file(cluster: &Cluster, name: &str, text: &str) -> String {
    let path = cluster.directory.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Writes files of several sizes and reads them back, whole and in parts, also after a remount with an empty cache.
fn works(cluster: &Cluster, volume: &str, flags: &[&str], cache: Option<&Path>) {
    let sizes = [100usize, 5000, 70_000, 300_000, 9 << 20];
    let mount = Mount::with_cache(cluster, volume, cache, flags);
    for size in sizes {
        fs::write(mount.join(format!("f{size}")), prose(size)).unwrap();
    }
    let file = fs::OpenOptions::new()
        .write(true)
        .open(mount.join("f300000"))
        .unwrap();
    file.write_all_at(b"HERE", 150_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    mount.unmount();
    let mount = Mount::with_cache(cluster, volume, cache, flags);
    for size in sizes {
        let mut expected = prose(size);
        if size == 300_000 {
            expected[150_000..150_004].copy_from_slice(b"HERE");
        }
        let file = fs::File::open(mount.join(format!("f{size}"))).unwrap();
        let mut part = vec![0; 50.min(size / 2)];
        file.read_exact_at(&mut part, size as u64 / 2).unwrap();
        assert_eq!(part, expected[size / 2..size / 2 + part.len()], "{size}");
        assert!(
            fs::read(mount.join(format!("f{size}"))).unwrap() == expected,
            "{size}"
        );
    }
    mount.unmount();
}

#[test]
fn compressed_volumes_are_smaller_and_may_change_their_codec() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    let s3 = S3::start();
    cluster.format_s3("small", &s3, &["--compress", "zstd"]);
    works(&cluster, "small", &[], None);
    cluster.format_file("quick", &["--compress", "lz4"]);
    works(&cluster, "quick", &[], None);
    let bucket = cluster.directory.join("bucket/quick");
    let stored = || -> u64 {
        let files = files_below(&bucket);
        files
            .iter()
            .map(|file| file.metadata().unwrap().len())
            .sum()
    };
    assert!(stored() < 2 << 20, "{} bytes for 9 MiB of prose", stored());
    // Each frame says how it is encoded: old files are read on, new ones are stored as the volume says now.
    let url = cluster.volume_url("quick");
    let shown = cluster.run(&["config", &url, "--compress", "none", "--json"]);
    assert_eq!(shown.success().json()["compress"], "none");
    let mount = cluster.mount("quick");
    let before = stored();
    fs::write(mount.join("plain"), prose(5 << 20)).unwrap();
    assert!(fs::read(mount.join("f9437184")).unwrap() == prose(9 << 20));
    mount.unmount();
    assert!(stored() - before >= 5 << 20);
}

/// Bytes that nothing compresses.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8))
        .flat_map(|_| next().to_le_bytes())
        .collect();
    bytes.truncate(length);
    bytes
}

/// Also where a file was written in pieces whose lengths are no multiple of anything.
#[test]
fn a_random_read_of_a_cold_file_fetches_128_kib_at_most() {
    const PIECE: usize = 300_001;
    const PIECES: usize = 60;
    const PAGE: usize = 4096;
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    let phrase = secret_file(&cluster, "phrase", "open sesame\n");
    cluster.format_file("plain", &[]);
    let encrypted = [
        "--encrypt",
        "--compress",
        "zstd",
        "--passphrase-file",
        &phrase,
    ];
    cluster.format_file("encoded", &encrypted);
    let data = noise(PIECE * PIECES);
    for (volume, flags) in [
        ("plain", vec![]),
        ("encoded", vec!["--passphrase-file", &phrase]),
    ] {
        let mount = Mount::of(&cluster, volume, &flags);
        let file = fs::File::create(mount.join("pieces")).unwrap();
        for (n, piece) in data.chunks(PIECE).enumerate() {
            file.write_all_at(piece, (n * PIECE) as u64).unwrap();
            file.sync_all().unwrap();
        }
        fs::write(mount.join("whole"), &data).unwrap();
        drop(file);
        mount.unmount();

        let address = format!("127.0.0.1:{}", support::free_ports(1)[0]);
        let flags = [&flags[..], &["--metrics", &address, "--cache-size", "0"]].concat();
        let mount = Mount::of(&cluster, volume, &flags);
        let counter = |name| support::metric(&address, &format!("heliofs_blockstore_{name}_total"));
        let mut fetched = Vec::new();
        for name in ["whole", "pieces"] {
            let file = fs::File::open(mount.join(name)).unwrap();
            // Here and there: a multiple of a number that has no common factor with the number of pages.
            let pages = data.len() / PAGE;
            for n in 1..50 {
                let at = n * 1999 % pages * PAGE;
                if name == "pieces" && at / PIECE != (at + PAGE - 1) / PIECE {
                    continue;
                }
                let (bytes, hedged) = (counter("get_bytes"), counter("hedged_gets"));
                let mut page = [0; PAGE];
                file.read_exact_at(&mut page, at as u64).unwrap();
                assert!(page[..] == data[at..at + PAGE], "{name} at {at}");
                // What was asked for twice, since the machine is slow, says nothing.
                if counter("hedged_gets") == hedged {
                    fetched.push(counter("get_bytes") - bytes);
                }
            }
        }
        let (most, cold) = (
            fetched.iter().max().unwrap(),
            fetched.iter().filter(|n| **n > 0),
        );
        println!(
            "{volume}: {most} bytes at most, {} reads from the bucket",
            cold.clone().count()
        );
        assert!(cold.count() > 50);
        assert!(
            *most <= 128 << 10,
            "{volume}: {most} bytes for one page: {fetched:?}"
        );
        mount.unmount();
    }
}

fn openssl(arguments: &[&str]) -> String {
    let made = std::process::Command::new("openssl")
        .args(arguments)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    String::from_utf8(made.stdout).unwrap()
}

#[test]
fn an_rsa_key_opens_a_volume_that_was_formatted_with_its_public_half() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    let generate = [
        "genpkey",
        "-algorithm",
        "RSA",
        "-pkeyopt",
        "rsa_keygen_bits:2048",
    ];
    let private = secret_file(&cluster, "private.pem", &openssl(&generate));
    let other = secret_file(&cluster, "other.pem", &openssl(&generate));
    let locked = openssl(&[
        "pkcs8",
        "-topk8",
        "-in",
        &private,
        "-passout",
        "pass:sesame",
    ]);
    let locked = secret_file(&cluster, "locked.pem", &locked);
    let public = openssl(&["pkey", "-in", &private, "-pubout"]);
    let public = secret_file(&cluster, "public.pem", &public);
    fs::set_permissions(&public, fs::Permissions::from_mode(0o644)).unwrap();
    cluster.format_file("wrapped", &["--encrypt", "--encrypt-key", &public]);
    works(&cluster, "wrapped", &["--encrypt-rsa-key", &private], None);

    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    let url = cluster.url();
    let mount = |key: &str, passphrase: Option<&str>| {
        let arguments = [
            "mount",
            &url,
            "wrapped",
            point.to_str().unwrap(),
            "--cache-size",
            "0",
            "--encrypt-key",
            key,
            // It ends once the mount is there, or can't be.
            "-d",
        ];
        cluster.run_with(&arguments, |command| {
            command.envs(passphrase.map(|text| ("HELIOFS_KEY_PASSPHRASE", text)));
        })
    };
    mount(&other, None).failure(1, "the RSA key is wrong");
    mount(&public, None).failure(1, "private key is needed");
    mount(&locked, None).failure(1, "none was given");
    mount(&locked, Some("barley")).failure(1, "passphrase is wrong");
    fs::set_permissions(&other, fs::Permissions::from_mode(0o640)).unwrap();
    mount(&other, None).failure(1, "can be read by others");
    assert!(!support::mount::is_mounted(&point));
    mount(&locked, Some("sesame")).success();
    assert!(support::mount::is_mounted(&point));
    cluster.run(&["umount", point.to_str().unwrap()]).success();

    // Another key takes its place; the data stays as it is.
    fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
    let volume = cluster.volume_url("wrapped");
    let change = [
        "config",
        &volume,
        "--encrypt-key",
        &private,
        "--new-encrypt-key",
        &other,
    ];
    cluster.run(&change).success();
    mount(&private, None).failure(1, "the RSA key is wrong");
    let mounted = Mount::of(&cluster, "wrapped", &["--encrypt-key", &other]);
    assert!(fs::read(mounted.join("f70000")).unwrap() == prose(70_000));
    mounted.unmount();
}

/// A pair of age's own tests.
const IDENTITY: &str = "# a comment, as age-keygen writes one
AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33
";
const RECIPIENT: &str = "age1t7rxyev2z3rw82stdlrrepyc39nvn86l5078zqkf5uasdy86jp6svpy7pa\n";

#[test]
fn an_age_recipient_wraps_a_volume_s_key_and_only_its_identity_mounts_it() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    let identity = secret_file(&cluster, "identity.txt", IDENTITY);
    let recipient = secret_file(&cluster, "recipient.txt", RECIPIENT);
    fs::set_permissions(&recipient, fs::Permissions::from_mode(0o644)).unwrap();
    cluster.format_file("aged", &["--encrypt", "--encrypt-key", &recipient]);
    works(&cluster, "aged", &["--encrypt-key", &identity], None);
    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    let url = cluster.url();
    let mount = |key: &str| {
        let point = point.to_str().unwrap();
        cluster.run(&[
            "mount",
            &url,
            "aged",
            point,
            "--cache-size",
            "0",
            "--encrypt-key",
            key,
            "-d",
        ])
    };
    mount(&recipient).failure(1, "the identity (AGE-SECRET-KEY-1…) is needed");
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o644)).unwrap();
    mount(&identity).failure(1, "can be read by others");
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o600)).unwrap();

    // Another way takes its place, and back.
    let phrase = secret_file(&cluster, "phrase", "open sesame\n");
    let volume = cluster.volume_url("aged");
    let change = ["config", &volume, "--encrypt-key", &identity];
    let change = [&change[..], &["--new-passphrase-file", &phrase]].concat();
    cluster.run(&change).success();
    mount(&identity).failure(1, "opened by a passphrase, not by an age key");
    let mounted = Mount::of(&cluster, "aged", &["--passphrase-file", &phrase]);
    assert!(fs::read(mounted.join("f70000")).unwrap() == prose(70_000));
    mounted.unmount();
}

#[test]
fn an_encrypted_volume_shows_nothing_to_whoever_has_only_the_bucket() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    let right = secret_file(&cluster, "right", "open sesame\n");
    let wrong = secret_file(&cluster, "wrong", "open barley\n");
    let refused = cluster.run(&[
        "format",
        &cluster.url(),
        "secret",
        "--encrypt",
        "--bucket",
        "/nowhere",
    ]);
    refused.failure(2, "no passphrase was given");
    cluster.format_file(
        "secret",
        &[
            "--encrypt",
            "--compress",
            "lz4",
            "--passphrase-file",
            &right,
        ],
    );
    let shown = cluster
        .run(&["config", &cluster.volume_url("secret"), "--json"])
        .success();
    assert_eq!(shown.json()["encrypt"], "aes-256-gcm");
    let cache = cluster.directory.join("cache");
    works(
        &cluster,
        "secret",
        &["--passphrase-file", &right],
        Some(&cache),
    );

    let mut looked_at = 0;
    for directory in [cluster.directory.join("bucket/secret"), cache] {
        for file in files_below(&directory) {
            let bytes = fs::read(&file).unwrap();
            let readable = bytes.windows(9).any(|window| window == &WORDS[..9]);
            assert!(!readable, "{} is in the clear", file.display());
            looked_at += usize::from(bytes.len() > 1000);
        }
    }
    assert!(looked_at >= 8, "only {looked_at} files of data");

    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    let mount = |flags: &[&str]| {
        let url = cluster.url();
        let mut arguments = vec![
            "mount",
            &url,
            "secret",
            point.to_str().unwrap(),
            "--cache-size",
            "0",
        ];
        arguments.extend(flags);
        cluster.run(&arguments)
    };
    mount(&[]).failure(2, "no passphrase was given");
    mount(&["--passphrase-file", &wrong]).failure(1, "the passphrase is wrong");
    fs::set_permissions(&wrong, fs::Permissions::from_mode(0o644)).unwrap();
    mount(&["--passphrase-file", &wrong]).failure(1, "can be read by others");
    assert!(!support::mount::is_mounted(&point));

    // A new passphrase takes the place of the old one; the data stays as it is.
    let new = secret_file(&cluster, "new", "open oats\n");
    let url = cluster.volume_url("secret");
    let change = [
        "config",
        &url,
        "--passphrase-file",
        &right,
        "--new-passphrase-file",
        &new,
    ];
    cluster.run(&change).success();
    mount(&["--passphrase-file", &right]).failure(1, "the passphrase is wrong");
    let mounted = Mount::of(&cluster, "secret", &["--passphrase-file", &new]);
    assert!(fs::read(mounted.join("f70000")).unwrap() == prose(70_000));
    mounted.unmount();
}
