//! What is mounted where, as the kernel tells.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A line of /proc/self/mountinfo.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MountInfo {
    pub(super) device: String,
    pub(super) mount_point: PathBuf,
    pub(super) kind: String,
    pub(super) source: String,
}

/// Source: proc_pid_mountinfo(5).
fn parse_mountinfo(line: &str) -> Option<MountInfo> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ');
    let device = before.nth(2)?.to_owned();
    let mount_point = unescape(before.nth(1)?);
    let mut after = after.split(' ');
    Some(MountInfo {
        device,
        mount_point,
        kind: after.next()?.to_owned(),
        source: after.next()?.to_owned(),
    })
}

/// Blanks, tabs, newlines and backslashes are written as `\ooo`.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                path.push(byte);
                at += 4;
            }
            None => {
                path.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&path))
}

/// What is mounted there; the last one if several lie above each other.
pub(super) fn mounted_at(mount_point: &Path) -> Option<MountInfo> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    text.lines()
        .filter_map(parse_mountinfo)
        .rfind(|info| info.mount_point == mount_point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let line = "36 35 0:53 / /mnt/a\\040b rw,noatime shared:1 master:2 - fuse.heliofs heliofs:v rw,user_id=0";
        let info = parse_mountinfo(line).unwrap();
        assert_eq!(info.device, "0:53");
        assert_eq!(info.mount_point, Path::new("/mnt/a b"));
        assert_eq!(
            (info.kind.as_str(), info.source.as_str()),
            ("fuse.heliofs", "heliofs:v")
        );
        assert_eq!(parse_mountinfo("nonsense"), None);
        assert!(mounted_at(Path::new("/proc")).is_some());
    }
}
