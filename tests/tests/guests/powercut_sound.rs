//! Power cuts of what keeps its promise: xfs and btrfs with defaults, SQLite in both journal modes. No state fails.
//!
//! One guest works on a disk of each. Then commands look at what the disks may hold, as a user does at the next start: the kernel here mounts
//! file systems, which replays their logs, and SQLite opens a database whose last transactions were acknowledged.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, artefact};
use minivmm_tests::session::Session;
use minivmm_tests::{minivmm, runs, skip};

/// In the order in which they are loaded.
const MODULES: [&str; 7] = [
    "lib/libcrc32c",
    "crypto/xor",
    "lib/raid6/raid6_pq",
    "lib/zstd/zstd_compress",
    "crypto/blake2b_generic",
    "fs/xfs/xfs",
    "fs/btrfs/btrfs",
];

/// The disks as they are before. A database has a record, and beside it a file for the number of the last acknowledged one.
const MAKE: &str = r#"
truncate -s 320M xfs.img && mkfs.xfs -q xfs.img
truncate -s 128M btrfs.img && mkfs.btrfs -q btrfs.img >/dev/null
for mode in wal delete; do
    mkdir $mode
    printf '%-511d\n' 0 >$mode/acknowledged
    sqlite3 $mode/database "pragma journal_mode = $mode; create table t (n integer primary key, data blob);
        insert into t values (0, '');" >/dev/null
    truncate -s 32M $mode.img && mke2fs -q -t ext4 -d $mode $mode.img
done
mkdir extra/lib && cp "$(command -v sqlite3)" extra
ldd extra/sqlite3 | grep -o '/[^ ]*' | xargs -I '{}' cp -L '{}' extra/lib
"#;

/// `acknowledge DIRECTORY N` in the guest: what it writes was written after transaction N was durable.
const ACKNOWLEDGE: &str =
    "printf '%-511d\\n' $2 | dd of=$1/acknowledged conv=notrunc,fsync 2>/dev/null\n";

/// What the guest does, the more often the larger `$ROUNDS` is.
const WORK: &str = r#"set -e
mkdir /tmp/extra
mount -t ext4 -o ro /dev/vdb /tmp/extra
for module in $MODULES; do insmod /tmp/extra/$module.ko; done
files() {
    mkdir /tmp/$2 && mount -t $2 $1 /tmp/$2 && cd /tmp/$2
    for n in $(seq $((ROUNDS * 8))); do
        mkdir $n
        head -c 20000 /dev/urandom >$n/file
        mv $n/file $n/name
        sync
        head -c 30000 /dev/urandom | dd of=$n/other conv=fsync bs=5000 2>/dev/null
        [ $((n % 3)) != 0 ] || rm -r $((n - 1))
    done
    cd / && umount /tmp/$2
}
database() {
    mkdir /tmp/$2 && mount -t ext4 $1 /tmp/$2
    {
        echo 'pragma synchronous = full; pragma wal_autocheckpoint = 12;'
        for n in $(seq $((ROUNDS * 16))); do
            echo "begin; insert into t values ($n, randomblob(6000));"
            echo "update t set data = randomblob(5000) where n = $n / 2; commit;"
            echo ".shell sh /tmp/extra/acknowledge /tmp/$2 $n"
        done
    } | LD_LIBRARY_PATH=/tmp/extra/lib /tmp/extra/lib/ld-linux-x86-64.so.2 /tmp/extra/sqlite3 -bail /tmp/$2/database
    umount /tmp/$2
}
files /dev/vdc xfs
files /dev/vdd btrfs
database /dev/vde wal
database /dev/vdf delete
"#;

/// `files STATE TYPE CHECK...`: the file system mounts, all can be read, and the checker finds nothing.
const FILES: &str = r#"state=$1 type=$2
shift 2
[ $type = xfs ] || "$@" $state 2>&1 || exit 1
mount=$(mktemp -d)
options=loop
# All states have the UUID of the image.
[ $type != xfs ] || options=loop,nouuid
mount -t $type -o $options $state $mount || exit 2
find $mount -type f -exec cat {} + >/dev/null
read=$?
umount $mount && rmdir $mount || exit 3
[ $read = 0 ] || exit 4
"$@" $state 2>&1
"#;

/// `database STATE LOST`: ext4 replays its journal, SQLite its own, and no acknowledged transaction is missing but for LOST.
const DATABASE: &str = r#"
e2fsck -y -E journal_only $1 >/dev/null 2>&1 || [ $? = 1 ] || exit 1
files=$(mktemp -d)
trap 'rm -r $files' EXIT
debugfs -R "rdump / $files" $1 >/dev/null 2>&1
n=$(tr -cd 0-9 <$files/acknowledged)
found=$(sqlite3 $files/database "pragma integrity_check;
    select count(*) = max(n) + 1 and max(n) between $n - $2 and $n + 1 from t;" | tr '\n' ' ')
[ "$found" = "ok 1 " ] || { echo "acknowledged $n: $found"; exit 2; }
"#;

/// A disk, what the medium writes at once, and what looks at a state.
///
/// Without `--force`, btrfs check looks through the mounts of all loop devices, and fails if one of another state goes away meanwhile.
///
/// In DELETE mode a transaction ends when its journal is removed. With synchronous=FULL SQLite does not make that durable, as EXTRA does
/// (<https://www.sqlite.org/pragma.html#pragma_synchronous>): the last transaction may be rolled back, but no other and no part.
const DISKS: [(&str, &str, &[&str]); 4] = [
    ("xfs", "512", &["sh", "files", "{}", "xfs", "xfs_repair", "-n"]),
    ("btrfs", "4096", &["sh", "files", "{}", "btrfs", "btrfs", "check", "--force"]),
    ("wal", "4096", &["sh", "database", "{}", "0"]),
    ("delete", "4096", &["sh", "database", "{}", "1"]),
];

/// Makes the disks, and takes a log of each.
fn take_logs(directory: &Path, rounds: u32) {
    let extra = directory.join("extra");
    fs::create_dir(&extra).unwrap();
    let release = fs::read_to_string(artefact("linux-cloud/release")).unwrap();
    let kernel = artefact(&format!("linux-cloud/lib/modules/{}/kernel", release.trim()));
    for module in MODULES {
        let from = kernel.join(module).with_extension("ko");
        fs::copy(&from, extra.join(from.file_name().unwrap())).unwrap();
    }
    fs::write(extra.join("acknowledge"), ACKNOWLEDGE).unwrap();
    fs::write(directory.join("files"), FILES).unwrap();
    fs::write(directory.join("database"), DATABASE).unwrap();
    let mut shell = Command::new("bash");
    shell.args(["-euc", &format!("PATH=$PATH:/usr/sbin:/sbin\n{MAKE}")]).current_dir(directory);
    Session::start(&mut shell).wait(BOOT_BOUND).must_be(0);

    let mut command = minivmm(["--timeout", "10m", "--kernel"]);
    command.arg(artefact(CLOUD.kernel)).arg("--initrd").arg(artefact(CLOUD.initrd));
    command.arg("--disk").arg(format!("{},readonly=on", artefact("tools.img").display()));
    command.args(["--disk", "extra,readonly=on"]);
    for (name, ..) in DISKS {
        command.args(["--disk", &format!("{name}.img,snapshot=on,log-writes={name}.log")]);
    }
    let names = MODULES.map(|module| module.rsplit('/').next().unwrap());
    let work = format!("MODULES='{}'\nROUNDS={rounds}\n{WORK}", names.join(" "));
    command.args(["--exec", &work]).current_dir(directory).env("TMPDIR", directory);
    Session::start(&mut command).wait(BOOT_BOUND).must_be(0);
}

#[test]
fn xfs_btrfs_and_sqlite_pass() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root may mount file systems");
    }
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    // A log of four rounds has more than 10,000 states.
    take_logs(at, runs(1, 4));
    let states = runs(5, 10_000);
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    // Where they are no part of the kernel, and a mount does not load them.
    let modules = ["-aq", "loop", "xfs", "btrfs"];
    let _ = Command::new("modprobe").args(modules).env("PATH", &path).status();
    let bound = BOOT_BOUND + Duration::from_secs(states.into());
    for (name, atomic, judge) in DISKS {
        let (log, image) = (format!("{name}.log"), format!("{name}.img"));
        let mut command = minivmm(["powercut", &log, "--base", &image, "--atomic", atomic]);
        command.args(["--states", &states.to_string(), "--command-timeout", "5m", "--"]);
        command.args(judge).current_dir(at).env("TMPDIR", at).env("PATH", &path);
        let ended = Session::start(&mut command).wait(bound).must_be(0);
        let text = String::from_utf8_lossy(&ended.output);
        assert!(text.contains(" states: 0 failed\n"), "{name}: {text}");
        println!("{name}: {}", text.trim_end());
    }
}
