//! Paths of the inodes that entries of a changelog name, so that people recognise what was changed.

use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::ids::Ino;
use meta_client::{ClientError, Session};
use serde_json::{Value, json};

/// Entries of a directory per question.
const PAGE: u32 = 4096;

/// Entries of a directory whose names are remembered; what lies in a larger one gets no path.
const NAMES_MAX: usize = 100_000;

/// Names of all directories together.
const REMEMBERED_MAX: usize = 1_000_000;

/// Directories above one another; more are a loop.
const DEPTH_MAX: usize = 4096;

/// Fields that hold an inode, and those that its path is put into.
const NAMED: [(&str, &str); 5] = [
    ("inode", "path"),
    ("parent", "parent_path"),
    ("new_parent", "new_parent_path"),
    ("source", "source_path"),
    ("target", "target_path"),
];

/// All inodes that the fields of an entry name.
fn inodes(fields: &Value, found: &mut Vec<u64>) {
    match fields {
        Value::Array(each) => each.iter().for_each(|value| inodes(value, found)),
        Value::Object(object) => {
            found.extend(
                NAMED
                    .iter()
                    .filter_map(|(field, _)| object.get(*field)?.as_u64()),
            );
            object.values().for_each(|value| inodes(value, found));
        }
        _ => {}
    }
}

/// Puts paths beside inodes.
fn put(fields: &mut Value, paths: &BTreeMap<u64, Option<String>>) {
    match fields {
        Value::Array(each) => each.iter_mut().for_each(|value| put(value, paths)),
        Value::Object(object) => {
            object.values_mut().for_each(|value| put(value, paths));
            for (field, beside) in NAMED {
                if let Some(ino) = object.get(field).and_then(Value::as_u64) {
                    let path = paths.get(&ino).cloned().flatten();
                    object.insert(beside.to_owned(), json!(path));
                }
            }
        }
        _ => {}
    }
}

/// Resolves inodes as the volume is now; remembers what it has looked at.
pub(super) struct TailPaths {
    session: Session,
    paths: BTreeMap<u64, Option<String>>,
    directories: BTreeMap<u64, BTreeMap<u64, Bytes>>,
}

impl TailPaths {
    /// Over a volume that nobody changes.
    pub(super) fn new(session: Session) -> Self {
        Self {
            session,
            paths: BTreeMap::new(),
            directories: BTreeMap::new(),
        }
    }

    /// Puts a path beside each inode that the entry names; `null`: it has no name.
    pub(super) async fn put(&mut self, entry: &mut Value) -> Result<(), ClientError> {
        let mut named = Vec::new();
        inodes(&entry["fields"], &mut named);
        for ino in named {
            self.find(ino).await?;
        }
        put(&mut entry["fields"], &self.paths);
        Ok(())
    }

    /// Ends the session.
    pub(super) async fn end(self) {
        self.session.detach().await;
    }

    async fn find(&mut self, ino: u64) -> Result<(), ClientError> {
        // Upwards until something is known, and down again.
        let mut way = Vec::new();
        let mut at = ino;
        let mut above = loop {
            if at == Ino::ROOT.0 {
                break Some(String::new());
            }
            if let Some(known) = self.paths.get(&at) {
                break known.clone();
            }
            let parent = match self.session.get_attr(Ino(at)).await {
                Ok((attr, _)) if way.len() < DEPTH_MAX => attr.parent,
                Ok(_) | Err(ClientError::Verdict(_)) => {
                    self.paths.insert(at, None);
                    break None;
                }
                Err(error) => return Err(error),
            };
            let name = self.name_in(parent, at).await?;
            way.push((at, name));
            at = parent;
        };
        if ino == Ino::ROOT.0 {
            self.paths.insert(ino, Some("/".to_owned()));
            return Ok(());
        }
        for (at, name) in way.into_iter().rev() {
            above = above
                .zip(name)
                .map(|(above, name)| format!("{above}/{}", String::from_utf8_lossy(&name)));
            self.paths.insert(at, above.clone());
        }
        Ok(())
    }

    /// A name of `ino` in a directory, which is read once.
    async fn name_in(&mut self, directory: u64, ino: u64) -> Result<Option<Bytes>, ClientError> {
        if let Some(known) = self.directories.get(&directory) {
            return Ok(known.get(&ino).cloned());
        }
        let mut names = BTreeMap::new();
        let mut after = 0;
        loop {
            let read = self.session.read_dir(Ino(directory), after, PAGE, false);
            let page = match read.await {
                Ok((page, _)) => page,
                Err(ClientError::Verdict(_)) => break,
                Err(error) => return Err(error),
            };
            let last = page.entries.last().map(|entry| entry.cookie);
            for entry in page.entries {
                names.entry(entry.ino).or_insert(entry.name);
            }
            if names.len() > NAMES_MAX {
                tracing::warn!(directory, "it is too large: what lies in it is not named");
                names.clear();
                break;
            }
            match last {
                Some(last) if !page.end => after = last,
                _ => break,
            }
        }
        let name = names.get(&ino).cloned();
        let remembered: usize = self.directories.values().map(BTreeMap::len).sum();
        if remembered > REMEMBERED_MAX {
            self.directories.clear();
        }
        self.directories.insert(directory, names);
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stand_beside_inodes_wherever_these_are() {
        let mut fields = json!({
            "files": [{ "inode": 7, "bytes": 9 }, { "inode": 8, "bytes": 1 }],
            "changes": [{ "unlink": { "parent": 1, "directory": false } }],
        });
        let mut found = Vec::new();
        inodes(&fields, &mut found);
        found.sort_unstable();
        assert_eq!(found, [1, 7, 8]);
        let paths = [
            (7, Some("/a".to_owned())),
            (8, None),
            (1, Some("/".to_owned())),
        ];
        put(&mut fields, &paths.into());
        let wanted = json!({
            "files": [
                { "inode": 7, "bytes": 9, "path": "/a" },
                { "inode": 8, "bytes": 1, "path": null },
            ],
            "changes": [{ "unlink": { "parent": 1, "directory": false, "parent_path": "/" } }],
        });
        assert_eq!(fields, wanted);
    }
}
