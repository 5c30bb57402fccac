//! The chapter *Cut the power*: a log of a Linux guest, and what e2fsck says about the states.

use std::os::unix::fs::symlink;
use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, artefact};
use minivmm_tests::runs;
use minivmm_tests::session::Session;

#[test]
fn ext4_passes_by_default_and_fails_without_barriers() {
    const CHAPTER: &str = include_str!("../../../devices/docs/cut-the-power.md");
    let directory = tempfile::tempdir().unwrap();
    let files =
        [("vmlinuz", CLOUD.kernel), ("initrd.img", CLOUD.initrd), ("root.img", "tools.img")];
    for (name, artefact_name) in files {
        symlink(artefact(artefact_name), directory.path().join(name)).unwrap();
    }
    symlink(minivmm_tests::binary(), directory.path().join("minivmm")).unwrap();
    let blocks = CHAPTER.split("```sh\n").skip(1);
    let scripts: Vec<_> = blocks.map(|block| block.split("```").next().unwrap()).collect();
    let outputs = ["", " 0 failed\n", "the same again: ", "it fails again\n"];
    assert_eq!(scripts.len(), outputs.len(), "{scripts:#?}");
    for (script, output) in scripts.iter().zip(outputs) {
        let script = script.replace("--states 100", &format!("--states {}", runs(25, 100)));
        let mut shell = Command::new("bash");
        shell.args(["-ec", &format!("PATH=$PWD:$PATH:/usr/sbin:/sbin\n{script}")]);
        shell.current_dir(directory.path()).env("TMPDIR", std::env::temp_dir());
        let ended = Session::start(&mut shell).wait(BOOT_BOUND).must_be(0);
        assert!(String::from_utf8_lossy(&ended.output).contains(output), "{script}: {ended}");
    }
}
