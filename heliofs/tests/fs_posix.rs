//! What a Linux file system promises, on a real mount: above all what others get wrong (setuid after fallocate, ctime after
//! setxattr, listings beside renames, times before 1970, …).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::{Cluster, Mount};

const NOBODY: u32 = 65534;

/// One node and one mount.
struct Lab {
    mount: Mount,
    cluster: Cluster,
}

fn lab(volume: &str) -> Lab {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file(volume, &["--deletion-grace", "0s"]);
    Lab {
        mount: cluster.mount(volume),
        cluster,
    }
}

/// Bytes that repeat nowhere.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Runs a line of Python as an unprivileged user, and expects success.
fn as_nobody(script: &str, argument: &Path) {
    let output = Command::new("python3")
        .args(["-c", script])
        .arg(argument)
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn files_of_all_sizes_read_back_here_and_after_a_remount() {
    let Lab { mount, cluster } = lab("sizes");
    let sizes = [
        0,
        1,
        4095,
        4096,
        4097,
        65_536,
        65_537,
        1 << 20,
        (4 << 20) + 1,
        23 << 20,
    ];
    for (seed, size) in sizes.into_iter().enumerate() {
        let path = mount.join(size.to_string());
        fs::write(&path, noise(seed as u64, size)).unwrap();
        assert!(
            fs::read(&path).unwrap() == noise(seed as u64, size),
            "{size} bytes, from the same mount"
        );
    }
    mount.unmount();
    let mount = cluster.mount("sizes");
    for (seed, size) in sizes.into_iter().enumerate() {
        let path = mount.join(size.to_string());
        assert_eq!(fs::metadata(&path).unwrap().len(), size as u64);
        assert!(
            fs::read(&path).unwrap() == noise(seed as u64, size),
            "{size} bytes, after a remount"
        );
    }
}

#[test]
fn overwrites_truncations_and_holes_agree_with_a_byte_array() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("model");
    let path = mount.join("file");
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut model = Vec::new();
    let mut state = 42u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for step in 0..400u64 {
        let offset = random(6 << 20);
        match random(10) {
            0 => {
                file.set_len(offset).unwrap();
                model.resize(offset as usize, 0);
            }
            1 => file.sync_all().unwrap(),
            2 => {
                let length = random(1 << 20);
                let punched = unsafe_free_punch(&file, offset, length + 1);
                assert!(punched, "punch");
                let end = ((offset + length + 1) as usize).min(model.len());
                if (offset as usize) < end {
                    model[offset as usize..end].fill(0);
                }
            }
            _ => {
                let length = if step % 7 == 0 {
                    1 << 20
                } else {
                    random(20_000) as usize
                };
                let data = noise(step, length);
                file.write_all_at(&data, offset).unwrap();
                let end = offset as usize + length;
                if length > 0 && model.len() < end {
                    model.resize(end, 0);
                }
                model[offset as usize..][..length.min(end - offset as usize)]
                    .copy_from_slice(&data);
            }
        }
        if step % 20 == 0 {
            assert_eq!(
                file.metadata().unwrap().len(),
                model.len() as u64,
                "step {step}"
            );
            assert!(fs::read(&path).unwrap() == model, "step {step}");
        }
    }
    drop(file);
    assert!(fs::read(&path).unwrap() == model);
}

/// fallocate(2) with PUNCH_HOLE, by the program: the test crate has no unsafe code.
fn unsafe_free_punch(file: &File, offset: u64, length: u64) -> bool {
    file.sync_data().unwrap();
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    Command::new("fallocate")
        .args([
            "--punch-hole",
            "--offset",
            &offset.to_string(),
            "--length",
            &length.to_string(),
        ])
        .arg(path)
        .status()
        .unwrap()
        .success()
}

#[test]
fn every_kind_of_write_by_others_clears_setuid_at_once() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("setuid");
    fs::set_permissions(&mount.path, fs::Permissions::from_mode(0o777)).unwrap();
    let ways = [
        (
            "write",
            "import os,sys; f=os.open(sys.argv[1],os.O_RDWR); os.write(f,b'x'); assert os.fstat(f).st_mode&0o6000==0",
        ),
        (
            "truncate",
            "import os,sys; os.truncate(sys.argv[1],1); assert os.stat(sys.argv[1]).st_mode&0o6000==0",
        ),
        (
            "ftruncate",
            "import os,sys; f=os.open(sys.argv[1],os.O_RDWR); os.ftruncate(f,2); assert os.fstat(f).st_mode&0o6000==0",
        ),
        (
            "O_TRUNC",
            "import os,sys; f=os.open(sys.argv[1],os.O_RDWR|os.O_TRUNC); assert os.fstat(f).st_mode&0o6000==0",
        ),
        (
            "fallocate",
            "import os,sys; f=os.open(sys.argv[1],os.O_RDWR); os.posix_fallocate(f,0,100); assert os.fstat(f).st_mode&0o6000==0",
        ),
        (
            "copy_file_range",
            "import os,sys; s=os.open(sys.argv[1]+'.src',os.O_RDONLY); f=os.open(sys.argv[1],os.O_RDWR); assert os.copy_file_range(s,f,4)==4; assert os.fstat(f).st_mode&0o6000==0",
        ),
    ];
    for (way, script) in ways {
        let path = mount.join(way);
        fs::write(&path, b"12345678").unwrap();
        fs::write(mount.join(format!("{way}.src")), b"abcdefgh").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        assert_eq!(mode(&path), 0o6777, "{way}");
        as_nobody(script, &path);
        assert_eq!(mode(&path), 0o777, "{way}");
    }
    // Root keeps them.
    let path = mount.join("root");
    fs::write(&path, b"x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
    fs::write(&path, b"yy").unwrap();
    assert_eq!(mode(&path), 0o6777);
}

#[test]
fn a_write_removes_capabilities() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("capability");
    let path = mount.join("program");
    fs::write(&path, b"#!/bin/true\n").unwrap();
    let script = "import os,sys\n\
        p=sys.argv[1]\n\
        v=bytes.fromhex('0000000200040000000000000000000000000000')\n\
        os.setxattr(p,'security.capability',v)\n\
        assert os.getxattr(p,'security.capability')\n\
        f=os.open(p,os.O_WRONLY|os.O_APPEND)\n\
        os.write(f,b'x')\n\
        try:\n\
        \tos.getxattr(p,'security.capability'); sys.exit('still there')\n\
        except OSError as e: assert e.errno==61, e\n";
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn times_are_fine_and_may_lie_before_1970() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("times");
    let path = mount.join("file");
    fs::write(&path, b"x").unwrap();
    // touch(1) takes fractions: 1.2 s and 0.8 s before 1970, which round differently when the sign is lost.
    let touched = Command::new("touch")
        .args(["-d", "1969-12-31T23:59:58.800000001Z"])
        .arg(&path)
        .status()
        .unwrap();
    assert!(touched.success());
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (-2, 800_000_001));
    assert_eq!((metadata.atime(), metadata.atime_nsec()), (-2, 800_000_001));

    // Directory times move with every change, however fast they follow each other.
    let dir = mount.join("dir");
    fs::create_dir(&dir).unwrap();
    let times = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        )
    };
    let mut before = times(&dir);
    for number in 0..20 {
        File::create_new(dir.join(number.to_string())).unwrap();
        let after = times(&dir);
        assert!(
            after > before,
            "the directory's times did not move: {before:?}, {after:?}"
        );
        before = after;
    }
    // ctime follows an extended attribute.
    let ctime = |path: &Path| {
        fs::metadata(path)
            .map(|m| (m.ctime(), m.ctime_nsec()))
            .unwrap()
    };
    let before = ctime(&path);
    let script = "import os,sys; os.setxattr(sys.argv[1],'user.a',b'1')";
    assert!(
        Command::new("python3")
            .args(["-c", script])
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    assert!(ctime(&path) > before);
    // A write shows before it is stored, and does not go back when it is.
    let file = File::options().append(true).open(&path).unwrap();
    let before = times(&path);
    (&file).write_all(b"more").unwrap();
    let written = times(&path);
    assert!(written > before);
    file.sync_all().unwrap();
    assert!(times(&path) >= written);
    // A time that was set survives the data that was written before it.
    (&file).write_all(b"even more").unwrap();
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000))
        .unwrap();
    drop(file);
    assert_eq!(fs::metadata(&path).unwrap().mtime(), 1_000_000);
}

#[test]
fn an_unlinked_or_replaced_file_stays_usable_while_it_is_open() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("orphans");
    let path = mount.join("file");
    let mut file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.write_all(&noise(1, 100_000)).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all(b"after").unwrap();
    file.sync_all().unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap();
    assert_eq!(read.len(), 100_005);
    assert!(read.starts_with(&noise(1, 100_000)));

    fs::write(mount.join("old"), b"old").unwrap();
    fs::write(mount.join("new"), b"new!").unwrap();
    let old = File::open(mount.join("old")).unwrap();
    fs::rename(mount.join("new"), mount.join("old")).unwrap();
    let metadata = old.metadata().unwrap();
    assert_eq!(
        (metadata.nlink(), metadata.len()),
        (0, 3),
        "fstat after rename-over"
    );
    assert_eq!(fs::read(mount.join("old")).unwrap(), b"new!");
    assert!(!mount.join("new").exists());
}

#[test]
fn listings_show_each_name_once_while_names_change() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("listing");
    let dir = mount.join("dir");
    fs::create_dir(&dir).unwrap();
    let stable: BTreeSet<String> = (0..3000).map(|number| format!("stable-{number}")).collect();
    for name in &stable {
        File::create_new(dir.join(name)).unwrap();
    }
    for number in 0..50 {
        File::create_new(dir.join(format!("moving-{number}"))).unwrap();
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, dir) = (&stop, &dir);
        scope.spawn(move || {
            let mut turn = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let (from, to) = if turn % 2 == 0 {
                    ("moving", "moved")
                } else {
                    ("moved", "moving")
                };
                for number in 0..50 {
                    fs::rename(
                        dir.join(format!("{from}-{number}")),
                        dir.join(format!("{to}-{number}")),
                    )
                    .unwrap();
                }
                turn += 1;
            }
        });
        for _ in 0..10 {
            let mut seen = BTreeSet::new();
            for entry in fs::read_dir(dir).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(seen.insert(name.clone()), "{name} came twice");
            }
            assert!(
                seen.is_superset(&stable),
                "{} of the names that stayed are missing",
                stable.difference(&seen).count()
            );
            let moving = seen.iter().filter(|name| name.starts_with("mov")).count();
            assert!(moving >= 50 - 50 / 2, "{moving}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // What is removed while it is listed is gone, here and in the kernel's cache.
    fs::remove_dir_all(&dir).unwrap();
    assert!(!dir.exists());
}

#[test]
fn names_links_and_renames_give_the_errors_that_programs_expect() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("names");
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    let path = |name: &str| mount.join(name);
    fs::write(path("file"), b"1").unwrap();
    fs::create_dir(path("dir")).unwrap();
    fs::write(path("dir/inside"), b"1").unwrap();
    assert_eq!(errno(fs::create_dir(path("file"))), libc_of("EEXIST"));
    assert_eq!(errno(fs::remove_dir(path("dir"))), libc_of("ENOTEMPTY"));
    assert_eq!(
        errno(fs::rename(path("file"), path("dir"))),
        libc_of("EISDIR")
    );
    assert_eq!(
        errno(fs::rename(path("dir"), path("file"))),
        libc_of("ENOTDIR")
    );
    assert_eq!(
        errno(fs::rename(path("dir"), path("dir/inside/below"))),
        libc_of("ENOTDIR")
    );
    fs::create_dir(path("dir/sub")).unwrap();
    assert_eq!(
        errno(fs::rename(path("dir"), path("dir/sub/below"))),
        libc_of("EINVAL")
    );
    assert_eq!(
        errno(fs::write(path(&"n".repeat(256)), b"")),
        libc_of("ENAMETOOLONG")
    );
    assert_eq!(
        errno(fs::metadata(path(&"n".repeat(256))).map(drop)),
        libc_of("ENAMETOOLONG")
    );
    fs::write(path(&"n".repeat(255)), b"").unwrap();
    symlink("loop", path("loop")).unwrap();
    assert_eq!(errno(fs::read(path("loop")).map(drop)), libc_of("ELOOP"));
    symlink("x".repeat(4000), path("long")).unwrap();
    assert_eq!(fs::read_link(path("long")).unwrap().as_os_str().len(), 4000);

    // Two names of one file: a rename between them does nothing.
    fs::hard_link(path("file"), path("second")).unwrap();
    fs::rename(path("file"), path("second")).unwrap();
    assert!(path("file").exists() && path("second").exists());
    assert_eq!(fs::metadata(path("file")).unwrap().nlink(), 2);
    // RENAME_NOREPLACE and RENAME_EXCHANGE.
    let script = "import ctypes,os,sys\n\
        c=ctypes.CDLL(None,use_errno=True)\n\
        d=sys.argv[1].encode()\n\
        def r(a,b,f): return 0 if c.renameat2(-100,d+b'/'+a,-100,d+b'/'+b,f)==0 else ctypes.get_errno()\n\
        assert r(b'file',b'dir',1)==17\n\
        assert r(b'file',b'fresh',1)==0\n\
        assert r(b'fresh',b'dir',2)==0\n\
        assert os.path.isdir(sys.argv[1]+'/fresh') and os.path.isfile(sys.argv[1]+'/dir')\n\
        assert r(b'fresh',b'absent',2)==2\n\
        assert r(b'dir',b'other',4)==22\n";
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(&mount.path)
        .status()
        .unwrap();
    assert!(status.success());
    assert!(path("fresh/inside").exists());
}

fn libc_of(name: &str) -> i32 {
    match name {
        "EEXIST" => 17,
        "ENOTDIR" => 20,
        "EISDIR" => 21,
        "EINVAL" => 22,
        "ENAMETOOLONG" => 36,
        "ENOTEMPTY" => 39,
        "ELOOP" => 40,
        _ => unreachable!("{name}"),
    }
}

#[test]
fn special_files_acls_and_attributes_work() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("special");
    let script = "import os,stat,sys\n\
        d=sys.argv[1]\n\
        os.mkfifo(d+'/fifo'); assert stat.S_ISFIFO(os.stat(d+'/fifo').st_mode)\n\
        os.mknod(d+'/dev',stat.S_IFCHR|0o600,os.makedev(1,3)); s=os.stat(d+'/dev')\n\
        assert stat.S_ISCHR(s.st_mode) and (os.major(s.st_rdev),os.minor(s.st_rdev))==(1,3)\n\
        open(d+'/dev','wb').write(b'to /dev/null')\n\
        p=d+'/f'; open(p,'w').write('x')\n\
        def e(f):\n\
        \ttry: f(); return 0\n\
        \texcept OSError as x: return x.errno\n\
        assert e(lambda: os.getxattr(p,'user.none'))==61\n\
        os.setxattr(p,'user.a',b'1'*300,os.XATTR_CREATE)\n\
        assert e(lambda: os.setxattr(p,'user.a',b'2',os.XATTR_CREATE))==17\n\
        assert e(lambda: os.setxattr(p,'user.b',b'2',os.XATTR_REPLACE))==61\n\
        os.setxattr(p,'user.b',b''); os.setxattr(p,'trusted.c',b'3')\n\
        assert sorted(os.listxattr(p))==['trusted.c','user.a','user.b'], os.listxattr(p)\n\
        assert os.getxattr(p,'user.a')==b'1'*300 and os.getxattr(p,'user.b')==b''\n\
        os.removexattr(p,'user.a'); assert e(lambda: os.removexattr(p,'user.a'))==61\n\
        assert e(lambda: os.setxattr(p,'user.big',b'x'*65537)) in (7,28,34)\n";
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(&mount.path)
        .status()
        .unwrap();
    assert!(status.success());

    // A default ACL is inherited and decides instead of the umask.
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(&mount.path)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    if Command::new("setfacl").arg("--version").output().is_ok() {
        fs::create_dir(mount.join("acl")).unwrap();
        run("setfacl", &["-d", "-m", "u:nobody:rwx,g::r-x,o::-", "acl"]);
        run(
            "sh",
            &["-c", "umask 077; echo x > acl/inherits; mkdir acl/below"],
        );
        let acl = run("getfacl", &["-c", "acl/inherits"]);
        assert!(acl.contains("user:nobody:rwx"), "{acl}");
        let acl = run("getfacl", &["-c", "acl/below"]);
        assert!(acl.contains("default:user:nobody:rwx"), "{acl}");
        fs::set_permissions(mount.join("acl"), fs::Permissions::from_mode(0o755)).unwrap();
        as_nobody(
            "import sys; open(sys.argv[1],'a').write('y')",
            &mount.join("acl/inherits"),
        );
    }
}

#[test]
fn sparse_files_know_their_data_and_holes() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("sparse");
    let path = mount.join("sparse");
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(&noise(1, 100_000), 1 << 30).unwrap();
    file.write_all_at(b"end", (1 << 40) - 3).unwrap();
    assert!(
        file.metadata().unwrap().blocks() < 1000,
        "a hole takes no space"
    );
    let script = "import os,sys\n\
        f=os.open(sys.argv[1],os.O_RDWR)\n\
        g=1<<30\n\
        assert os.lseek(f,0,os.SEEK_DATA)==g\n\
        assert os.lseek(f,g+5,os.SEEK_DATA)==g+5\n\
        assert os.lseek(f,g,os.SEEK_HOLE)==g+100000\n\
        assert os.lseek(f,0,os.SEEK_HOLE)==0\n\
        assert os.lseek(f,g+100000,os.SEEK_DATA)==(1<<40)-3\n\
        assert os.lseek(f,(1<<40)-1,os.SEEK_HOLE)==1<<40\n\
        for w in (os.SEEK_DATA,os.SEEK_HOLE):\n\
        \ttry: os.lseek(f,1<<40,w); sys.exit('beyond')\n\
        \texcept OSError as e: assert e.errno==6\n";
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    let mut buffer = vec![1; 4096];
    file.read_exact_at(&mut buffer, 1 << 35).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 0));
    // Copies share: no data is read or written.
    let copied = Command::new("cp")
        .args(["--reflink=never", "--sparse=auto"])
        .arg(&path)
        .arg(mount.join("copy"))
        .status()
        .unwrap();
    assert!(copied.success());
    let copy = File::open(mount.join("copy")).unwrap();
    assert_eq!(copy.metadata().unwrap().len(), 1 << 40);
    let mut buffer = vec![0; 100_000];
    copy.read_exact_at(&mut buffer, 1 << 30).unwrap();
    assert!(buffer == noise(1, 100_000));
}

#[test]
fn ten_thousand_random_extents_in_a_sparse_tebibyte_read_back() {
    let Lab { mount, cluster } = lab("extents");
    let path = mount.join("file");
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.set_len(1 << 40).unwrap();
    let place = |number: u64| (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24) & !0xfff;
    for number in 0..10_000u64 {
        file.write_all_at(&noise(number, 4096), place(number))
            .unwrap();
    }
    drop(file);
    mount.unmount();
    let mount = cluster.mount("extents");
    let file = File::open(mount.join("file")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    // Two numbers may share a place: the later one won.
    let last: std::collections::HashMap<u64, u64> =
        (0..10_000).map(|number| (place(number), number)).collect();
    let mut buffer = vec![0; 4096];
    for number in 0..10_000 {
        let place = place(number);
        file.read_exact_at(&mut buffer, place).unwrap();
        assert!(
            buffer == noise(last[&place], 4096),
            "extent {number} at {place}"
        );
    }
    // Between them there are holes.
    let mut holes = 0;
    for number in 10_000..10_500 {
        let place = place(number);
        if !last.contains_key(&place) {
            holes += 1;
            file.read_exact_at(&mut buffer, place).unwrap();
            assert!(buffer.iter().all(|byte| *byte == 0), "a hole at {place}");
        }
    }
    assert!(holes > 400, "{holes}");
}

#[test]
fn mapped_files_are_written_back() {
    let Lab { mount, cluster } = lab("mapped");
    let script = "import mmap,os,sys\n\
        f=os.open(sys.argv[1],os.O_RDWR|os.O_CREAT); os.ftruncate(f,1<<20)\n\
        m=mmap.mmap(f,1<<20); m[5000:5005]=b'hello'; m[(1<<20)-1]=33\n\
        assert os.pread(f,5,5000)==b'hello'\n\
        os.pwrite(f,b'world',6000); assert m[6000:6005]==b'world'\n\
        m.close(); os.close(f)\n";
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(mount.join("m"))
        .status()
        .unwrap();
    assert!(status.success());
    mount.unmount();
    let mount = cluster.mount("mapped");
    let bytes = fs::read(mount.join("m")).unwrap();
    assert_eq!(
        (&bytes[5000..5005], &bytes[6000..6005], bytes[(1 << 20) - 1]),
        (&b"hello"[..], &b"world"[..], 33)
    );
}

#[test]
fn open_flags_mean_what_they_say() {
    let Lab {
        mount,
        cluster: _cluster,
    } = lab("flags");
    let path = mount.join("file");
    fs::write(&path, noise(1, 10_000)).unwrap();
    assert!(
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .is_err()
    );
    File::options()
        .write(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    let mut a = File::options().append(true).open(&path).unwrap();
    let mut b = File::options().append(true).open(&path).unwrap();
    for _ in 0..10 {
        a.write_all(b"aa").unwrap();
        b.write_all(b"bbb").unwrap();
    }
    assert_eq!(fs::read(&path).unwrap(), b"aabbb".repeat(10));
    let direct = File::options()
        .read(true)
        .custom_flags(0o40000)
        .open(&path)
        .unwrap();
    let mut buffer = [0; 5];
    direct.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"aabbb");
}
