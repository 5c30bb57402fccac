//! QEMU's own client library drives the control socket.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest};
use tempfile::tempdir;

/// What is installed from PyPI.
const LIBRARY: &str = "qemu.qmp==0.0.6";

/// A Python that has the library: a virtual environment in the cache, made once. `None`, with a word: this host's Python
/// makes none.
fn python() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    let cache = set("MINIVMM_CACHE").unwrap_or_else(|| cache.expect("HOME is set").join("minivmm"));
    let environment = cache.join(LIBRARY.replace("==", "-"));
    let python = environment.join("bin/python3");
    if python.exists() {
        return Some(python);
    }
    fs::create_dir_all(&cache).unwrap();
    let making = cache.join(format!("{LIBRARY}.{}", std::process::id()));
    let run = |program: &Path, arguments: &[&str]| {
        Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
    };
    let made = run(Path::new("python3"), &["-m", "venv", making.to_str().unwrap()]);
    if !made {
        minivmm_tests::skip("`python3 -m venv` does not work here (apt install python3-venv)");
        let _ = fs::remove_dir_all(&making);
        return None;
    }
    let installed = run(&making.join("bin/python3"), &["-m", "pip", "install", "--quiet", LIBRARY]);
    assert!(installed, "pip cannot install {LIBRARY}");
    // Another test may have been faster; its environment is as good.
    if fs::rename(&making, &environment).is_err() {
        let _ = fs::remove_dir_all(&making);
    }
    Some(python)
}

#[test]
fn qemus_client_library_drives_every_command() {
    if !kvm_is_usable() {
        return;
    }
    let Some(python) = python() else { return };
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 30);
    let options = [
        "--qmp",
        "unix:socket",
        "--paused",
        "--cpus",
        "2",
        "--disk",
        "disk.img,id=data,fault=none",
        "--save-directory",
        ".",
    ];
    let vm = Session::start(small_guest(directory.path(), Program::DiskLoad).args(options));
    let socket = directory.path().join("socket");
    minivmm_tests::qmp::Qmp::connect(&socket);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qemu_qmp.py");
    let ended =
        Session::start(Command::new(python).arg(script).arg(&socket)).wait(BOUND).must_be(0);
    assert_eq!(String::from_utf8_lossy(&ended.output), "qemu.qmp is content\n", "{ended}");
    vm.wait(BOUND).must_be(0);
}
