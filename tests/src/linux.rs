//! Linux guests: Debian's kernels with a small initrd that runs a script, from the artefacts of `make guest`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::files::sparse;
use crate::minivmm;
use crate::session::{Ended, Session};

/// Kernel words of the guests. An emulated CPU pays for mitigations, which replace every return and indirect call, and for the
/// self-tests of ciphers: a fifth of a boot.
pub const WORDS: &str = "quiet mitigations=off cryptomgr.notests";

/// How long a guest may take to boot, or from one line that a test waits for to the next. A stock kernel in the lab takes 15
/// seconds on an idle machine, and took over 300 on one with nine jobs for each processor.
pub const BOOT_BOUND: Duration = Duration::from_secs(600);

/// A file that `resources/prepare` made (resources/README.md).
pub fn artefact(name: &str) -> PathBuf {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = set("MINIVMM_CACHE").unwrap_or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        cache.expect("HOME is set").join("minivmm")
    });
    let path = cache.join(name);
    assert!(path.exists(), "{} is missing: make it with `make guest`", path.display());
    path
}

/// The files a guest boots from, by their names in the cache.
#[derive(Clone, Copy, Debug)]
pub struct System {
    /// The kernel.
    pub kernel: &'static str,
    /// Its initrd. `/init` runs `/run.sh`, where it has one.
    pub initrd: &'static str,
}

/// The system that most tests use: the quickest to boot.
pub const CLOUD: System = System { kernel: "linux-cloud/vmlinux", initrd: "initrd-cloud.cpio" };

/// The system that benchmarks use: it boots in a second, and leaves most of the time to the monitor.
pub const SMALL: System = System { kernel: "linux-small/vmlinux", initrd: "initrd-small.cpio" };

/// What scripts can use. Changing a terminal's settings waits for its output (TCSADRAIN).
const FUNCTIONS: &str = r#"
fact() { echo "fact: $*"; }
settle() { stty -F /dev/ttyS0 -echo; }
results=0
result() {
    for disk in /sys/block/vd*; do
        [ "$(cat $disk/serial)" != results ] || dd if=$1 of=/dev/${disk##*/} bs=64k seek=$results conv=fsync 2>/dev/null
    done
    results=$((results + 1))
}"#;

/// Bytes of a result, at most.
const RESULT: usize = 64 << 10;

/// A guest yet to be started, with a directory of its own for its files.
#[derive(Debug)]
pub struct Guest {
    directory: TempDir,
    arguments: Vec<String>,
}

impl Guest {
    /// A guest that runs `script` and then powers off. Lines that the script prints by `fact NAME VALUE...` are in the
    /// [`Report`]; `settle` waits until everything printed so far has left the guest, before an end that is not orderly.
    pub fn new(system: System, script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = format!("{FUNCTIONS}\n{script}\n");
        let mut initrd = fs::read(artefact(system.initrd)).unwrap();
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend_from_slice(&cpio("run.sh", script.as_bytes()));
        fs::write(directory.path().join("initrd"), initrd).unwrap();
        let kernel = artefact(system.kernel).into_os_string().into_string().unwrap();
        let arguments = ["--kernel", &kernel, "--initrd", "initrd", "--cmdline", WORDS];
        Self { directory, arguments: arguments.map(str::to_owned).to_vec() }
    }

    /// Adds arguments, separated by spaces.
    #[must_use]
    pub fn with(mut self, arguments: &str) -> Self {
        self.arguments.extend(arguments.split_whitespace().map(str::to_owned));
        self
    }

    /// Adds a disk: a new, sparse image of `length` bytes, called `name` in the guest's directory. `options` follow a
    /// comma.
    #[must_use]
    pub fn with_disk(self, name: &str, length: u64, options: &str) -> Self {
        sparse(&self.path(name), length);
        let comma = if options.is_empty() { "" } else { "," };
        self.with(&format!("--disk {name}{comma}{options}"))
    }

    /// Boots from the tools disk, /dev/vda: the script finds fio, e2fsprogs and util-linux. It is read-only, and shared
    /// by all guests.
    #[must_use]
    pub fn with_tools(self) -> Self {
        let image = artefact("tools.img");
        self.with(&format!("--disk {},readonly=on", image.display()))
    }

    /// Adds a disk for [`results`](Self::results). A console is no way for them: each byte is a VM exit, the driver prints thousands in
    /// one interrupt, and in the lab that can take the 20 seconds after which a kernel complains of a soft lockup.
    #[must_use]
    pub fn with_results(self) -> Self {
        self.with_disk("results", 16 * RESULT as u64, "serial=results")
    }

    /// The files that the script gave to `result FILE`, in order.
    pub fn results(&self) -> Vec<String> {
        let disk = fs::read(self.path("results")).unwrap();
        let texts = disk.chunks(RESULT).map(|slot| String::from_utf8_lossy(slot));
        texts
            .map(|text| text.trim_end_matches('\0').to_owned())
            .take_while(|text| !text.is_empty())
            .collect()
    }

    /// A file in the guest's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Its command line, to be started in its directory.
    pub fn command(&self) -> Command {
        let mut command = minivmm(&self.arguments);
        // The lab's /var/tmp is read-only.
        command.current_dir(self.directory.path()).env("TMPDIR", std::env::temp_dir());
        command
    }

    /// Starts it.
    pub fn start(&self) -> Session {
        Session::start(&mut self.command())
    }

    /// Runs it to its end, which has to be with exit status `code`.
    #[track_caller]
    pub fn run(&self, code: i32) -> Report {
        Report::new(self.start().wait(BOOT_BOUND).must_be(code))
    }
}

/// What a guest reported.
#[derive(Debug)]
pub struct Report {
    /// How minivmm ended.
    pub ended: Ended,
    /// The console's text.
    pub text: String,
}

impl Report {
    /// Reads the facts of a guest that has ended.
    pub fn new(ended: Ended) -> Self {
        let text = String::from_utf8_lossy(&ended.output).replace('\r', "");
        Self { ended, text }
    }

    /// All values of a fact, in the order of printing.
    pub fn all<'a>(&'a self, name: &str) -> Vec<&'a str> {
        let facts =
            self.text.lines().filter_map(|line| line.strip_prefix("fact: ")?.strip_prefix(name));
        facts.filter(|value| value.is_empty() || value.starts_with(' ')).map(str::trim).collect()
    }

    /// The value of a fact that was printed once.
    #[track_caller]
    pub fn get(&self, name: &str) -> &str {
        match self.all(name)[..] {
            [value] => value,
            ref other => panic!("the guest printed {other:?} for {name:?}\n{}", self.ended),
        }
    }

    /// A fact that is a number.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        self.get(name)
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {:?}\n{}", self.get(name), self.ended))
    }
}

/// A newc archive of one executable file (Documentation/driver-api/early-userspace/buffer-format.rst); the kernel unpacks archives
/// that follow each other.
pub fn cpio(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, content) in [(name, 0o100_755, content), ("TRAILER!!!", 0, &[])] {
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// Checks an ext4 image without changing it: everything that the guest left has to be in order.
#[track_caller]
pub fn assert_clean(image: &Path) {
    let checked =
        Command::new("e2fsck").arg("-fn").arg(image).output().expect("e2fsck is installed");
    assert!(checked.status.success(), "e2fsck -fn: {}", String::from_utf8_lossy(&checked.stdout));
}

/// A file in an ext4 image.
pub fn content(image: &Path, file: &str) -> String {
    let shown = Command::new("debugfs").args(["-R", &format!("cat {file}")]).arg(image).output();
    String::from_utf8(shown.unwrap().stdout).unwrap()
}
