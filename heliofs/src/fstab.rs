//! `mount.heliofs SPEC DIR [-sfnv] [-o OPTIONS]`, as mount(8) calls it for a line of fstab such as
//! `helio://a,b,c/photos /photos heliofs token-file=/etc/heliofs/token,_netdev 0 0`.

use std::ffi::OsString;
use std::path::Path;

use crate::failure::{Failure, Outcome};

/// The name by which mount(8) finds the helper.
const HELPER: &str = "mount.heliofs";

/// Arguments as they came, or, when called as the helper, those of `heliofs mount -d`.
pub(crate) fn translate(arguments: impl Iterator<Item = OsString>) -> Outcome<Vec<OsString>> {
    let arguments: Vec<OsString> = arguments.collect();
    let called_as = |name: &OsString| {
        Path::new(name)
            .file_name()
            .is_some_and(|file| file == HELPER)
    };
    match arguments.split_first() {
        Some((name, rest)) if called_as(name) => helper(rest),
        _ => Ok(arguments),
    }
}

/// Source: mount(8), "EXTERNAL HELPERS".
fn helper(arguments: &[OsString]) -> Outcome<Vec<OsString>> {
    let mut translated: Vec<OsString> = ["heliofs", "mount", "-d"].map(OsString::from).into();
    let mut places = 0;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("-o") => {
                let options = rest
                    .next()
                    .ok_or_else(|| Failure::usage("-o needs options"))?;
                translated.extend(["-o".into(), options.clone()]);
            }
            // The type, and a name space that mount(8) has entered already.
            Some("-t" | "-N") => {
                rest.next();
            }
            Some("-v") => translated.push("-v".into()),
            // Fake: mount(8) wants to know only whether the helper is there.
            Some("-f") => return Ok(["heliofs", "version"].map(OsString::from).into()),
            // Sloppy: unknown options are errors all the same, a typing error must not mount something else. mtab is not ours.
            Some("-s" | "-n") => {}
            Some(option) if option.starts_with('-') => {
                return Err(Failure::usage(format!("{HELPER}: unknown option {option}")));
            }
            _ => {
                places += 1;
                translated.push(argument.clone());
            }
        }
    }
    if places == 2 {
        return Ok(translated);
    }
    Err(Failure::usage(format!(
        "usage: {HELPER} helio://HOST[,HOST…]/VOLUME DIRECTORY [-o OPTIONS]"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(line: &str) -> Outcome<Vec<String>> {
        let words = translate(line.split(' ').map(OsString::from))?;
        Ok(words
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect())
    }

    #[test]
    fn the_helper_is_a_background_mount() {
        assert_eq!(
            translated("/sbin/mount.heliofs helio://a,b/v /mnt -n -o rw,_netdev")
                .unwrap()
                .join(" "),
            "heliofs mount -d helio://a,b/v /mnt -o rw,_netdev"
        );
        assert_eq!(translated("/usr/bin/heliofs status x").unwrap().len(), 3);
    }

    #[test]
    fn what_mount_does_not_say_is_refused() {
        assert!(translated("mount.heliofs helio://a/v").is_err());
        assert!(translated("mount.heliofs helio://a/v /mnt -x").is_err());
        assert!(translated("mount.heliofs helio://a/v /mnt -o").is_err());
    }
}
