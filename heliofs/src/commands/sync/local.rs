//! [`Tree`]: a local directory as a place of objects; keys are paths below it.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use blockstore::object::{From, PlainObject};
use bytes::Bytes;

use crate::units;

/// Names of files that are being written begin so. They are locked; what a killed process left is not, and is removed.
const TEMPORARY: &str = ".heliofs-sync.";

/// A directory, or one file, whose key is empty.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

/// What a walk hands out.
pub(crate) enum Seen {
    File(PlainObject),
    /// Not copied, and why.
    Ignored {
        key: String,
        why: &'static str,
    },
}

/// A file that is read.
#[derive(Debug)]
pub(crate) struct Reader {
    file: Arc<File>,
    pub(crate) bytes: u64,
    modified: i64,
}

/// A file that is written; it appears with [`Writer::commit`], or never.
#[derive(Debug)]
pub(crate) struct Writer {
    file: Arc<File>,
    temporary: Option<PathBuf>,
    path: PathBuf,
    offset: u64,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let ran = tokio::task::spawn_blocking(work).await;
    ran.map_err(io::Error::other).flatten()
}

fn modified(metadata: &Metadata) -> i64 {
    metadata
        .mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(metadata.mtime_nsec())
}

impl Tree {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, key: &str) -> PathBuf {
        match key {
            "" => self.root.clone(),
            key => self.root.join(key),
        }
    }

    /// Hands out all files in the order of the bytes of their keys until `see` says `false`. Directories that `enter` refuses are
    /// not looked into; of a tree that does not exist nothing is seen. `clean`: what killed processes left is removed.
    ///
    /// In memory: the names of one directory, and of those above it. Errors: a directory that cannot be read, with its path.
    pub(crate) fn walk(
        &self,
        from: Option<&From>,
        clean: bool,
        enter: &dyn Fn(&str) -> bool,
        see: &mut dyn FnMut(Seen) -> bool,
    ) -> Result<(), (PathBuf, io::Error)> {
        let early = |key: &str| {
            from.is_some_and(|from| match key.ends_with('/') {
                true => key < from.key.as_str() && !from.key.starts_with(key),
                false if from.inclusive => key < from.key.as_str(),
                false => key <= from.key.as_str(),
            })
        };
        // Each level's names, the next one last.
        let mut levels = vec![self.names("", clean, see)?];
        while let Some(level) = levels.last_mut() {
            let Some(key) = level.pop() else {
                levels.pop();
                continue;
            };
            if early(&key) {
                continue;
            }
            if key.ends_with('/') {
                if enter(&key) {
                    levels.push(self.names(&key, clean, see)?);
                }
                continue;
            }
            let path = self.path(&key);
            match fs::metadata(&path) {
                Ok(metadata) => {
                    let file = PlainObject {
                        bytes: metadata.len(),
                        modified: modified(&metadata),
                        key,
                    };
                    if !see(Seen::File(file)) {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err((path, error)),
            }
        }
        Ok(())
    }

    /// Keys right below a directory, in reverse order; those of directories end with `/`.
    fn names(
        &self,
        directory: &str,
        clean: bool,
        see: &mut dyn FnMut(Seen) -> bool,
    ) -> Result<Vec<String>, (PathBuf, io::Error)> {
        let path = self.path(directory);
        let fail = |error| (path.clone(), error);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error)),
        };
        let mut keys = Vec::new();
        for entry in entries {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            let mut ignore = |why| {
                let key = format!("{directory}{}", name.to_string_lossy());
                see(Seen::Ignored { key, why });
            };
            let Some(text) = name.to_str() else {
                ignore("its name is not UTF-8");
                continue;
            };
            if text.starts_with(TEMPORARY) {
                if clean {
                    remove_left(&entry.path());
                }
                continue;
            }
            let kind = entry.file_type().map_err(fail)?;
            if kind.is_dir() {
                keys.push(format!("{directory}{text}/"));
            } else if kind.is_file() {
                keys.push(format!("{directory}{text}"));
            } else if kind.is_symlink() {
                match fs::metadata(entry.path()) {
                    Ok(target) if target.is_file() => keys.push(format!("{directory}{text}")),
                    // A tree of links may have no end.
                    Ok(target) if target.is_dir() => ignore("a symbolic link to a directory"),
                    Ok(_) => ignore("a symbolic link to a special file"),
                    Err(_) => ignore("a symbolic link to nothing"),
                }
            } else {
                ignore("a special file");
            }
        }
        keys.sort_unstable_by(|a, b| b.cmp(a));
        Ok(keys)
    }

    /// Opens a file.
    pub(crate) async fn open(&self, key: &str) -> io::Result<Reader> {
        let path = self.path(key);
        blocking(move || {
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            if !metadata.is_file() {
                return Err(io::Error::other("it is no longer a file"));
            }
            Ok(Reader {
                bytes: metadata.len(),
                modified: modified(&metadata),
                file: Arc::new(file),
            })
        })
        .await
    }

    /// Begins a file, in the directory where it will be; directories above it are created.
    pub(crate) async fn create(&self, key: &str) -> io::Result<Writer> {
        let path = self.path(key);
        blocking(move || {
            let directory = path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(directory)?;
            let temporary = directory.join(format!("{TEMPORARY}{}", units::random_hex()));
            let file = File::create_new(&temporary)?;
            let writer = Writer {
                file: Arc::new(file),
                temporary: Some(temporary),
                path,
                offset: 0,
            };
            writer.file.lock()?;
            Ok(writer)
        })
        .await
    }

    /// Deletes a file; one that does not exist is deleted already.
    pub(crate) async fn delete(&self, key: &str) -> io::Result<()> {
        let path = self.path(key);
        blocking(move || match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        })
        .await
    }
}

/// Removes a temporary file unless its writer lives.
fn remove_left(path: &Path) {
    let removed = File::open(path).map(|file| match file.try_lock() {
        Ok(()) => fs::remove_file(path),
        Err(_) => Ok(()),
    });
    match removed.flatten() {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "a temporary file of a killed sync stays");
        }
        _ => {}
    }
}

impl Reader {
    /// `length` bytes from `offset`; all of them, or an error.
    pub(crate) async fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes.into())
        })
        .await
    }

    /// Nanoseconds since 1970.
    pub(crate) fn modified(&self) -> i64 {
        self.modified
    }

    /// Whether it was not written to since it was opened.
    pub(crate) async fn unchanged(&self) -> io::Result<bool> {
        let file = Arc::clone(&self.file);
        let before = (self.bytes, self.modified);
        blocking(move || {
            let now = file.metadata()?;
            Ok((now.len(), modified(&now)) == before)
        })
        .await
    }
}

impl Writer {
    /// Appends.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        self.offset += bytes.len() as u64;
        blocking(move || file.write_all_at(&bytes, offset)).await
    }

    /// The file appears, on disk, with the time of its source.
    pub(crate) async fn commit(mut self, modified: i64) -> io::Result<()> {
        let Some(temporary) = self.temporary.take() else {
            return Ok(());
        };
        let (file, path) = (Arc::clone(&self.file), self.path.clone());
        blocking(move || {
            let since = Duration::from_nanos(modified.unsigned_abs());
            let time = match modified >= 0 {
                true => UNIX_EPOCH + since,
                false => UNIX_EPOCH - since,
            };
            let done = file
                .set_modified(time)
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&temporary, path));
            if done.is_err() {
                // What went wrong is more telling than why this did not work either.
                let _ = fs::remove_file(&temporary);
            }
            done
        })
        .await
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // The next run removes it otherwise.
            let _ = fs::remove_file(temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(tree: &Tree, from: Option<From>) -> (Vec<String>, Vec<String>) {
        let (mut files, mut ignored) = (Vec::new(), Vec::new());
        tree.walk(from.as_ref(), true, &|_| true, &mut |seen| {
            match seen {
                Seen::File(file) => files.push(file.key),
                Seen::Ignored { key, .. } => ignored.push(key),
            }
            true
        })
        .unwrap();
        (files, ignored)
    }

    #[test]
    fn files_come_in_the_order_of_bytes_from_any_key_on() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = Tree::new(scratch.path().to_owned());
        let mut keys = ["d/a", "d/b/c", "d-x", "d.txt", "d0", "e", "é/ü"].map(str::to_owned);
        for key in &keys {
            let path = scratch.path().join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, key).unwrap();
        }
        keys.sort();
        std::os::unix::fs::symlink("d", scratch.path().join("link")).unwrap();
        std::os::unix::fs::symlink("e", scratch.path().join("z")).unwrap();
        let mut all = keys.to_vec();
        all.insert(all.len() - 1, "z".to_owned());
        assert_eq!(walk(&tree, None), (all.clone(), vec!["link".to_owned()]));
        for (at, key) in all.iter().enumerate() {
            for inclusive in [true, false] {
                let key = key.clone();
                let (found, _) = walk(&tree, Some(From { key, inclusive }));
                assert_eq!(found, all[at + usize::from(!inclusive)..]);
            }
        }
        let nowhere = Tree::new(scratch.path().join("nowhere"));
        assert_eq!(walk(&nowhere, None).0, Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_file_appears_whole_or_not_at_all() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = Tree::new(scratch.path().to_owned());
        let mut writer = tree.create("new/file").await.unwrap();
        writer.write(Bytes::from_static(b"one ")).await.unwrap();
        // A writer that lives keeps its file.
        assert_eq!(walk(&tree, None).0, Vec::<String>::new());
        writer.write(Bytes::from_static(b"two")).await.unwrap();
        writer.commit(1_000_000_000_000_000_123).await.unwrap();
        let reader = tree.open("new/file").await.unwrap();
        assert_eq!(reader.modified(), 1_000_000_000_000_000_123);
        assert_eq!(reader.read(4, 3).await.unwrap(), "two");
        assert!(reader.unchanged().await.unwrap());
        fs::write(scratch.path().join("new/file"), "three").unwrap();
        assert!(!reader.unchanged().await.unwrap());
        drop(tree.create("new/other").await.unwrap());
        // What a killed process left.
        let left = scratch.path().join(format!("new/{TEMPORARY}0"));
        fs::write(&left, "x").unwrap();
        assert_eq!(walk(&tree, None).0, ["new/file"]);
        assert!(!left.exists());
        assert_eq!(fs::read_dir(scratch.path().join("new")).unwrap().count(), 1);
    }
}
