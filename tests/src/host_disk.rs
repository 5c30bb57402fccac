//! A host file whose I/O a test can hold: one file, served through FUSE by a thread of the test.
//!
//! It stands for a disk that does not answer (dead NFS, a suspended device-mapper device). While it hangs, requests are
//! kept without a reply, and the process that made them waits in the kernel. Dropping the file system answers them with
//! an error, so that no process stays behind.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use tempfile::TempDir;

use crate::{BOUND, skip};

const FILE: INodeNo = INodeNo(2);
const NAME: &str = "disk.img";
/// Attributes are asked for anew each time.
const TTL: Duration = Duration::ZERO;

/// The mounted file system. It hangs and answers as its owner says.
#[derive(Debug)]
pub struct HostDisk {
    directory: TempDir,
    state: Arc<Mutex<State>>,
    _session: BackgroundSession,
}

#[derive(Debug, Default)]
struct State {
    content: Vec<u8>,
    hangs: bool,
    /// Hold what asks for the file's attributes, such as fstat(2).
    holds_attributes: bool,
    held: Vec<Held>,
    /// What writes and syncs fail with.
    error: Option<i32>,
}

/// A request that waits for its reply.
#[derive(Debug)]
enum Held {
    Read(ReplyData, usize, usize),
    Write(ReplyWrite, usize, Vec<u8>),
    Sync(ReplyEmpty),
    Attributes(ReplyAttr),
}

impl HostDisk {
    /// Mounts a file of `size` zero bytes. `None` where this process may not mount (no /dev/fuse, not root): the calling test is then
    /// skipped, which this has said, and returns.
    pub fn mount(size: usize) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let state = Arc::new(Mutex::new(State { content: vec![0; size], ..State::default() }));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("minivmm-test".to_owned())];
        let session =
            fuser::spawn_mount(Server { state: Arc::clone(&state) }, directory.path(), &config);
        let Ok(session) = session else {
            skip("no FUSE file system can be mounted here");
            return None;
        };
        Some(Self { directory, state, _session: session })
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join(NAME)
    }

    /// The directory that the file is in.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// From now on no request is answered.
    pub fn hang(&self) {
        self.state.lock().unwrap().hangs = true;
    }

    /// From now on a process that asks for the file's attributes waits.
    pub fn hold_attributes(&self) {
        self.state.lock().unwrap().holds_attributes = true;
    }

    /// Answers the held requests, and the later ones again.
    pub fn serve(&self) {
        let mut state = self.state.lock().unwrap();
        (state.hangs, state.holds_attributes) = (false, false);
        for held in std::mem::take(&mut state.held) {
            state.answer(held);
        }
    }

    /// From now on every write and sync fails with this errno.
    pub fn fail(&self, errno: i32) {
        self.state.lock().unwrap().error = Some(errno);
    }

    /// Waits until a request waits for its reply.
    pub fn wait_until_held(&self) {
        let deadline = Instant::now() + BOUND;
        while self.held() == 0 {
            assert!(Instant::now() < deadline, "no request comes");
            std::thread::yield_now();
        }
    }

    /// How many requests wait for their reply.
    pub fn held(&self) -> usize {
        self.state.lock().unwrap().held.len()
    }
}

impl State {
    fn take(&mut self, request: Held) {
        if self.hangs {
            self.held.push(request);
        } else {
            self.answer(request);
        }
    }

    fn answer(&mut self, request: Held) {
        let size = self.content.len();
        let error = self.error.map(Errno::from_i32);
        match (request, error) {
            (Held::Write(reply, ..), Some(error)) => reply.error(error),
            (Held::Sync(reply), Some(error)) => reply.error(error),
            (request, _) => self.carry_out(request, size),
        }
    }

    fn carry_out(&mut self, request: Held, size: usize) {
        match request {
            Held::Read(reply, offset, count) => {
                reply.data(&self.content[offset.min(size)..(offset + count).min(size)]);
            }
            Held::Write(reply, offset, data) => {
                self.content.resize(size.max(offset + data.len()), 0);
                self.content[offset..offset + data.len()].copy_from_slice(&data);
                reply.written(data.len() as u32);
            }
            Held::Sync(reply) => reply.ok(),
            Held::Attributes(reply) => reply.attr(&TTL, &attributes(FILE, size)),
        }
    }
}

struct Server {
    state: Arc<Mutex<State>>,
}

impl Server {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        attributes(inode, self.state.lock().unwrap().content.len())
    }
}

fn attributes(inode: INodeNo, length: usize) -> FileAttr {
    let file = inode == FILE;
    let size = if file { length as u64 } else { 0 };
    FileAttr {
        ino: inode,
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if file { FileType::RegularFile } else { FileType::Directory },
        perm: if file { 0o644 } else { 0o755 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let mut state = self.state.lock().unwrap();
        if inode == FILE && state.holds_attributes {
            return state.held.push(Held::Attributes(reply));
        }
        reply.attr(&TTL, &attributes(inode, state.content.len()));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.state.lock().unwrap().content.resize(size as usize, 0);
        }
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: every request of the monitor arrives here.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.state.lock().unwrap().take(Held::Read(reply, offset as usize, size as usize));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.state.lock().unwrap().take(Held::Write(reply, offset as usize, data.to_vec()));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.state.lock().unwrap().take(Held::Sync(reply));
    }
}
