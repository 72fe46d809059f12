//! The thin adapter between the kernel and [`Fs`].
//!
//! An operation is a future that ends with the answer to the kernel. It is polled once on the event loop that received the
//! request: what the caches can answer is answered without another thread, and what needs the network has sent its question by
//! then; the rest goes on on the runtime. So an event loop never waits.

mod raw;
mod reply;

use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use heliofs_proto::limits::NAME_BYTES_MAX;
use heliofs_proto::v1::{FileKind, LockKind};

use crate::errno::{Errno, FsResult};
use crate::fs::attr::AttrChange;
use crate::fs::data::{Allocation, Seek, WriteHow};
use crate::fs::dir::Listed;
use crate::fs::file::OpenHow;
use crate::fs::lock::LockRange;
use crate::fs::namespace::NewNode;
use crate::fs::xattr::SetXattrHow;
use crate::fs::{Caller, Fs};
use crate::metrics::Op;
use raw::Raw;

/// Largest write and read request: what the kernel's default limit of 256 pages per request allows.
const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Requests that the kernel may have under way on its own account (read-ahead, asynchronous I/O).
const BACKGROUND_MAX: u16 = 128;

/// Block size of statfs, bytes.
const STATFS_BLOCK: u64 = 4096;

/// What statfs shows as the size of a volume without limit: 1 PiB, as JuiceFS does; and as its inodes.
const UNLIMITED_BYTES: u64 = 1 << 50;
const UNLIMITED_INODES: u64 = 1 << 32;

/// Shortest entries of listings: fuse_direntplus or fuse_dirent with a name of up to 8 bytes.
const DIRENT_PLUS_BYTES: usize = 160;
const DIRENT_BYTES: usize = 32;

/// See the module.
pub(crate) struct Adapter {
    pub(crate) fs: Arc<Fs>,
}

fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        pid: request.pid(),
    }
}

fn bytes(name: &OsStr) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

impl Adapter {
    /// Runs an operation: here as far as it gets, then on the runtime.
    fn run(&self, operation: impl Future<Output = ()> + Send + 'static) {
        let runtime = self.fs.runtime();
        let _entered = runtime.enter();
        let mut operation = Box::pin(operation);
        let mut context = Context::from_waker(Waker::noop());
        if operation.as_mut().poll(&mut context).is_pending() {
            // Its wakers are registered anew when it is polled there.
            runtime.spawn(operation);
        }
    }

    /// As [`Adapter::run`], measured: `operation` makes the result, `answer` gives it to the kernel.
    fn answer<T: Send + 'static, F>(
        &self,
        op: Op,
        operation: impl FnOnce(Arc<Fs>) -> F,
        answer: impl FnOnce(&Fs, FsResult<T>) + Send + 'static,
    ) where
        F: Future<Output = FsResult<T>> + Send + 'static,
    {
        let since = Instant::now();
        let fs = self.fs.clone();
        let operation = operation(fs.clone());
        self.run(async move {
            let result = operation.await;
            let failed = result.is_err();
            answer(&fs, result);
            fs.metrics().ended(op, since, failed);
        });
    }

    fn make(
        &self,
        op: Op,
        request: &Request,
        (parent, name): (INodeNo, &OsStr),
        node: NewNode,
        reply: ReplyEntry,
    ) {
        let (caller, name) = (caller(request), bytes(name));
        let known = name.clone();
        self.answer(
            op,
            |fs| async move { fs.make_node(parent.0, &name, node, caller).await },
            move |fs, made| reply::entry(fs, reply, (parent.0, &known), made),
        );
    }

    fn remove(&self, op: Op, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(request), bytes(name));
        self.answer(
            op,
            move |fs| async move { fs.unlink(parent.0, &name, op == Op::RmDir, caller).await },
            |_, done| reply::empty(reply, done),
        );
    }
}

/// Whether open's flags ask for writing.
fn writes(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// Kind of the inode that mknod asks for.
fn kind_of_mode(mode: u32) -> FsResult<FileKind> {
    Ok(match mode & libc::S_IFMT {
        0 | libc::S_IFREG => FileKind::File,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => return Err(Errno::INVAL),
    })
}

fn lock_kind(kind: i32) -> FsResult<LockKind> {
    Ok(match kind {
        libc::F_RDLCK => LockKind::Read,
        libc::F_WRLCK => LockKind::Write,
        libc::F_UNLCK => LockKind::Unlock,
        _ => return Err(Errno::INVAL),
    })
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_BIG_WRITES,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_EXPORT_SUPPORT,
            // The kernel checks ACLs; the umask is applied by the server, unless a default ACL takes its place.
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DONT_MASK,
            // Without it the kernel asks for security.capability at every write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            // We know better than sizes and times tell when pages are outdated.
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_POSIX_LOCKS,
            InitFlags::FUSE_FLOCK_LOCKS,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel does not have this");
            }
        }
        // An error tells the nearest possible value, which is already the default then.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = bytes(name);
        let known = name.clone();
        self.answer(
            Op::Lookup,
            |fs| async move {
                // Asked by the kernel for file handles that outlived its memory of the inode (FUSE_EXPORT_SUPPORT).
                let dots = match &name[..] {
                    b"." => Some(parent.0),
                    b".." => Some(fs.parent_of(parent.0).await?),
                    _ => None,
                };
                match dots {
                    Some(ino) => Ok(crate::fs::namespace::Looked::Found(fs.get_attr(ino).await?)),
                    None => fs.lookup(parent.0, &name).await,
                }
            },
            move |fs, looked| reply::looked(fs, reply, (parent.0, &known), looked),
        );
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(
            Op::GetAttr,
            |fs| async move { fs.get_attr(ino.0).await },
            |fs, entry| reply::attr(fs, reply, entry),
        );
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (caller, raw) = (caller(request), Raw::of(request));
        let change = AttrChange {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: raw.atime(),
            mtime: raw.mtime(),
            kill_suidgid: raw.setattr_kills_suidgid(),
        };
        self.answer(
            Op::SetAttr,
            |fs| async move { fs.set_attr(ino.0, change, caller).await },
            |fs, entry| reply::attr(fs, reply, entry),
        );
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(
            Op::ReadLink,
            |fs| async move { fs.read_link(ino.0).await },
            |_, target| match target {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let kind = match kind_of_mode(mode) {
            Ok(kind) => kind,
            Err(error) => return reply.error(reply::errno(error)),
        };
        let node = NewNode {
            kind,
            mode: mode & 0o7777,
            umask,
            rdev,
            target: Bytes::new(),
        };
        self.make(Op::MkNod, request, (parent, name), node, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let node = NewNode {
            kind: FileKind::Directory,
            mode: mode & 0o7777,
            umask,
            rdev: 0,
            target: Bytes::new(),
        };
        self.make(Op::MkDir, request, (parent, name), node, reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(Op::Unlink, request, parent, name, reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(Op::RmDir, request, parent, name, reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let node = NewNode {
            kind: FileKind::Symlink,
            mode: 0o777,
            umask: 0,
            rdev: 0,
            target: bytes(target.as_os_str()),
        };
        self.make(Op::SymLink, request, (parent, link_name), node, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let known = RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE;
        if !known.contains(flags) {
            return reply.error(fuser::Errno::EINVAL);
        }
        let (caller, name, newname) = (caller(request), bytes(name), bytes(newname));
        self.answer(
            Op::Rename,
            |fs| async move {
                fs.rename(
                    (parent.0, &name),
                    (newparent.0, &newname),
                    flags.contains(RenameFlags::RENAME_NOREPLACE),
                    flags.contains(RenameFlags::RENAME_EXCHANGE),
                    caller,
                )
                .await
            },
            |_, done| reply::empty(reply, done),
        );
    }

    fn link(
        &self,
        request: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let (caller, name) = (caller(request), bytes(newname));
        let known = name.clone();
        self.answer(
            Op::Link,
            |fs| async move { fs.link(ino.0, newparent.0, &name, caller).await },
            move |fs, entry| reply::entry(fs, reply, (newparent.0, &known), entry),
        );
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(request);
        let how = OpenHow {
            truncate: flags.0 & libc::O_TRUNC != 0,
            kill_suidgid: Raw::of(request).open_kills_suidgid(),
            write: writes(flags.0),
        };
        self.answer(
            Op::Open,
            |fs| async move { fs.open(ino.0, how, caller).await },
            |_, opened| match opened {
                Ok(opened) => reply.opened(FileHandle(opened.handle), reply::open_flags(&opened)),
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, name) = (caller(request), bytes(name));
        let known = name.clone();
        let how = OpenHow {
            truncate: flags & libc::O_TRUNC != 0,
            kill_suidgid: Raw::of(request).open_kills_suidgid(),
            write: writes(flags),
        };
        let exclusive = flags & libc::O_EXCL != 0;
        let modes = (mode & 0o7777, umask);
        self.answer(
            Op::Create,
            |fs| async move {
                fs.create(parent.0, &name, modes, exclusive, how, caller)
                    .await
            },
            move |fs, created| reply::created(fs, reply, (parent.0, &known), created),
        );
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(
            Op::Read,
            |fs| async move {
                let file = fs.file(handle.0)?;
                fs.read(&file, offset, u64::from(size)).await
            },
            |_, data| match data {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn write(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let since = Instant::now();
        let file = match self.fs.file(handle.0) {
            Ok(file) => file,
            Err(error) => return reply.error(reply::errno(error)),
        };
        let how = WriteHow {
            offset,
            // What the kernel writes back from mapped pages has its place already.
            append: flags.0 & libc::O_APPEND != 0
                && !write_flags.contains(WriteFlags::FUSE_WRITE_CACHE),
            kill_suidgid: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
        };
        let written = {
            // A full buffer starts an upload.
            let _entered = self.fs.runtime().enter();
            self.fs.try_write(&file, how, data)
        };
        let answer = |reply: ReplyWrite, written: FsResult<u32>| match written {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(reply::errno(error)),
        };
        if let Some(written) = written {
            self.fs.metrics().ended(Op::Write, since, written.is_err());
            return answer(reply, written);
        }
        let (caller, data) = (caller(request), Bytes::copy_from_slice(data));
        self.answer(
            Op::Write,
            |fs| async move { fs.write(&file, how, data, caller).await },
            move |_, written| answer(reply, written),
        );
    }

    fn flush(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.answer(
            Op::Flush,
            |fs| async move {
                let file = fs.file(handle.0)?;
                let closed = fs.close(&file).await;
                // After the data: who gets the lock next must see it.
                fs.release_locks(ino.0, lock_owner.0, false).await?;
                closed
            },
            |_, done| reply::empty(reply, done),
        );
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.answer(
            Op::Release,
            |fs| async move { fs.release(handle.0, lock_owner.map(|owner| owner.0)).await },
            |_, done| reply::empty(reply, done),
        );
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.answer(
            Op::Fsync,
            |fs| async move {
                let file = fs.file(handle.0)?;
                fs.sync(&file).await
            },
            |_, done| reply::empty(reply, done),
        );
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let since = Instant::now();
        reply.opened(
            FileHandle(self.fs.open_dir(ino.0)),
            fuser::FopenFlags::empty(),
        );
        self.fs.metrics().ended(Op::OpenDir, since, false);
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries_max = Raw::of(request).read_size() / DIRENT_BYTES + 1;
        self.answer(
            Op::ReadDir,
            |fs| async move { page(&fs, ino.0, handle.0, offset, entries_max, false).await },
            move |_, page| match page {
                Ok(page) => {
                    for (number, cookie, name) in page.dots(ino.0) {
                        if reply.add(INodeNo(number), cookie, fuser::FileType::Directory, name) {
                            return reply.ok();
                        }
                    }
                    for listed in &page.entries {
                        let kind = reply::file_type(listed.kind);
                        let name = OsStr::from_bytes(&listed.name);
                        if reply.add(INodeNo(listed.ino), listed.cookie, kind, name) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let entries_max = Raw::of(request).read_size() / DIRENT_PLUS_BYTES + 1;
        self.answer(
            Op::ReadDir,
            |fs| async move { page(&fs, ino.0, handle.0, offset, entries_max, true).await },
            move |fs, page| match page {
                Ok(page) => {
                    let coherence = fs.coherence();
                    let _gate = coherence.gate();
                    for (number, cookie, name) in page.dots(ino.0) {
                        let (none, attr) = (std::time::Duration::ZERO, reply::dot_attr(number));
                        if reply.add(
                            INodeNo(number),
                            cookie,
                            name,
                            &none,
                            &attr,
                            reply::GENERATION,
                        ) {
                            return reply.ok();
                        }
                    }
                    for listed in &page.entries {
                        let Some(entry) = &listed.entry else {
                            // The server gave no attributes although they were asked for: without them there is no entry to
                            // give, and what follows would not be found again.
                            break;
                        };
                        let name = &listed.name[..];
                        let lifetime = fs.kernel_lifetime(
                            listed.ino,
                            entry.at,
                            entry.generation,
                            Some((ino.0, name)),
                        );
                        let attr = reply::file_attr(&entry.attr);
                        let full = reply.add(
                            INodeNo(listed.ino),
                            listed.cookie,
                            OsStr::from_bytes(name),
                            &lifetime,
                            &attr,
                            reply::GENERATION,
                        );
                        if full {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let since = Instant::now();
        let done = self.fs.release_dir(handle.0);
        self.fs
            .metrics()
            .ended(Op::ReleaseDir, since, done.is_err());
        reply::empty(reply, done);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.answer(
            Op::FsyncDir,
            move |fs| async move { fs.settled_all(Some(ino.0)).await },
            |_, done| reply::empty(reply, done),
        );
    }

    fn statfs(&self, _request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let ino = u64::from(ino);
        self.answer(
            Op::StatFs,
            move |fs| async move { fs.stat_fs(ino).await },
            |_, usage| match usage {
                Ok(usage) => {
                    let or =
                        |limit: u64, unlimited: u64| if limit == 0 { unlimited } else { limit };
                    let bytes = or(usage.capacity_bytes_max, UNLIMITED_BYTES);
                    let used = usage.used_bytes.div_ceil(STATFS_BLOCK);
                    let blocks = (bytes / STATFS_BLOCK).max(used);
                    let files = or(usage.inodes_max, UNLIMITED_INODES).max(usage.used_inodes);
                    let free = blocks - used;
                    let block = STATFS_BLOCK as u32;
                    reply.statfs(
                        blocks,
                        free,
                        free,
                        files,
                        files - usage.used_inodes,
                        block,
                        NAME_BYTES_MAX as u32,
                        block,
                    );
                }
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if flags & !(libc::XATTR_CREATE | libc::XATTR_REPLACE) != 0 {
            return reply.error(fuser::Errno::EINVAL);
        }
        let (caller, name, value) = (caller(request), bytes(name), Bytes::copy_from_slice(value));
        self.answer(
            Op::SetXattr,
            |fs| async move {
                let how = SetXattrHow {
                    create_only: flags & libc::XATTR_CREATE != 0,
                    replace_only: flags & libc::XATTR_REPLACE != 0,
                    kill_setgid: fs.acl_kills_setgid(ino.0, &name, caller).await?,
                };
                fs.set_xattr(ino.0, &name, value, how, caller).await
            },
            |_, done| reply::empty(reply, done),
        );
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let name = bytes(name);
        self.answer(
            Op::GetXattr,
            |fs| async move { fs.get_xattr(ino.0, &name).await },
            move |_, value| reply::xattr(reply, size, value),
        );
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer(
            Op::ListXattr,
            |fs| async move { fs.list_xattr(ino.0).await },
            move |_, names| reply::xattr(reply, size, names),
        );
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(request), bytes(name));
        self.answer(
            Op::RemoveXattr,
            |fs| async move { fs.remove_xattr(ino.0, &name, caller).await },
            |_, done| reply::empty(reply, done),
        );
    }

    fn getlk(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let flock = Raw::of(request).is_flock();
        self.answer(
            Op::GetLock,
            |fs| async move {
                let lock = LockRange {
                    owner: lock_owner.0,
                    kind: lock_kind(typ)?,
                    start,
                    end,
                    flock,
                    pid,
                };
                fs.test_lock(ino.0, lock).await
            },
            |_, conflict| match conflict {
                Ok(None) => reply.locked(0, 0, libc::F_UNLCK, 0),
                Ok(Some(lock)) => {
                    let kind = match lock.kind() {
                        LockKind::Unlock => libc::F_UNLCK,
                        LockKind::Read => libc::F_RDLCK,
                        LockKind::Write => libc::F_WRLCK,
                    };
                    reply.locked(lock.start, lock.end.min(i64::MAX as u64), kind, lock.pid);
                }
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn setlk(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let (caller, flock) = (caller(request), Raw::of(request).is_flock());
        self.answer(
            Op::SetLock,
            |fs| async move {
                let lock = LockRange {
                    owner: lock_owner.0,
                    kind: lock_kind(typ)?,
                    start,
                    end,
                    flock,
                    pid,
                };
                if lock.kind != LockKind::Unlock {
                    return fs.lock(ino.0, lock, sleep, caller).await;
                }
                // Who gets the lock next must see what was written under it.
                let synced = match fs.file(handle.0) {
                    Ok(file) => fs.sync(&file).await,
                    Err(_) => Ok(()),
                };
                fs.lock(ino.0, lock, sleep, caller).await?;
                synced
            },
            |_, done| reply::empty(reply, done),
        );
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let caller = caller(request);
        self.answer(
            Op::Fallocate,
            |fs| async move {
                let file = fs.file(handle.0)?;
                let how = Allocation::from_mode(mode)?;
                fs.fallocate(&file, (offset, length), how, caller).await
            },
            |_, done| reply::empty(reply, done),
        );
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.answer(
            Op::Lseek,
            |fs| async move {
                let file = fs.file(handle.0)?;
                let seek = match whence {
                    libc::SEEK_DATA => Seek::Data,
                    libc::SEEK_HOLE => Seek::Hole,
                    _ => return Err(Errno::INVAL),
                };
                let from = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
                let to = fs.seek(&file, from, seek).await?;
                i64::try_from(to).map_err(|_| Errno::FBIG)
            },
            |_, to| match to {
                Ok(to) => reply.offset(to),
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _ino_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let caller = caller(request);
        self.answer(
            Op::CopyFileRange,
            |fs| async move {
                let (source, target) = (fs.file(handle_in.0)?, fs.file(handle_out.0)?);
                fs.copy_range((&source, offset_in), (&target, offset_out), length, caller)
                    .await
            },
            |_, copied| match copied {
                Ok(copied) => reply.written(copied),
                Err(error) => reply.error(reply::errno(error)),
            },
        );
    }
}

/// A part of a listing.
struct DirPage {
    offset: u64,
    parent: u64,
    entries: Vec<Listed>,
}

impl DirPage {
    /// `.` and `..`, as far as they come after the offset: number, cookie, name.
    fn dots(&self, ino: u64) -> impl Iterator<Item = (u64, u64, &'static str)> {
        let offset = self.offset;
        [(ino, 1, "."), (self.parent, 2, "..")]
            .into_iter()
            .filter(move |(_, cookie, _)| *cookie > offset)
    }
}

async fn page(
    fs: &Fs,
    ino: u64,
    handle: u64,
    offset: u64,
    entries_max: usize,
    plus: bool,
) -> FsResult<DirPage> {
    let parent = match offset {
        0 | 1 => fs.parent_of(ino).await?,
        _ => 0,
    };
    Ok(DirPage {
        offset,
        parent,
        entries: fs.read_dir(handle, offset, entries_max, plus).await?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_come_first_and_once() {
        let page = |offset| DirPage {
            offset,
            parent: 7,
            entries: Vec::new(),
        };
        assert_eq!(
            page(0).dots(9).collect::<Vec<_>>(),
            [(9, 1, "."), (7, 2, "..")]
        );
        assert_eq!(page(1).dots(9).collect::<Vec<_>>(), [(7, 2, "..")]);
        assert_eq!(page(2).dots(9).count(), 0);
    }

    #[test]
    fn kinds_are_what_mknod_and_fcntl_say() {
        assert_eq!(kind_of_mode(libc::S_IFIFO | 0o644), Ok(FileKind::Fifo));
        assert_eq!(kind_of_mode(0o644), Ok(FileKind::File));
        assert_eq!(kind_of_mode(libc::S_IFDIR), Err(Errno::INVAL));
        assert_eq!(lock_kind(libc::F_UNLCK), Ok(LockKind::Unlock));
        assert_eq!(lock_kind(77), Err(Errno::INVAL));
    }
}
