//! A container as Docker makes them: its default seccomp profile, a user without any capability, a read-only root, /dev/kvm.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, WORDS, artefact};
use minivmm_tests::session::Session;
use minivmm_tests::skip;
use serde_json::{Value, json};

/// Docker's profile, as Podman has it.
const PROFILE: &str = "/usr/share/containers/seccomp.json";

/// The system calls that the profile allows a container without capabilities on this architecture, in the runtime's format.
fn seccomp() -> Value {
    let profile: Value = serde_json::from_reader(File::open(PROFILE).unwrap()).unwrap();
    let contains = |list: &Value, what: &str| {
        list.as_array().is_some_and(|list| list.iter().any(|item| item == what))
    };
    let applies = |rule: &&Value| {
        let (includes, excludes) = (&rule["includes"], &rule["excludes"]);
        includes["caps"].is_null()
            && (includes["arches"].is_null() || contains(&includes["arches"], "amd64"))
            && !contains(&excludes["arches"], "amd64")
    };
    let rules = profile["syscalls"].as_array().unwrap().iter().filter(applies).map(|rule| {
        let mut rule = rule.as_object().unwrap().clone();
        rule.retain(|key, value| {
            matches!(&**key, "names" | "action" | "args" | "errnoRet") && !value.is_null()
        });
        Value::Object(rule)
    });
    let rules: Vec<_> = rules.collect();
    assert!(rules.len() > 5, "{PROFILE} has {} rules", rules.len());
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": 1, // EPERM, as Docker has it
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

/// What the container runs, and which of this machine's directories it sees.
fn container(script: &str, directories: &[&Path]) -> Value {
    let bind = |path: &&Path| json!({ "destination": path, "source": path, "type": "bind", "options": ["rbind", "ro"] });
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] }),
    ];
    mounts.extend(directories.iter().map(bind));
    // The last: it may hide a directory above.
    mounts.push(json!({ "destination": "/writable", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"] }));
    let namespaces = ["pid", "mount", "ipc", "uts", "network"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.0",
        "process": {
            "user": { "uid": 1000, "gid": 1000 },
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/usr/bin:/bin", "TMPDIR=/writable"],
            "cwd": "/writable",
            "capabilities": { "bounding": [], "effective": [], "permitted": [] },
            "noNewPrivileges": true,
        },
        "root": { "path": "root", "readonly": true },
        "mounts": mounts,
        "linux": {
            "namespaces": namespaces,
            "devices": [{ "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232, "fileMode": 0o666 }],
            "seccomp": seccomp(),
        },
    })
}

#[test]
fn a_container_with_dockers_profile_runs_a_guest() {
    if std::env::var_os("MINIVMM_LAB").is_none() {
        return skip("crun needs root and cgroups, which the lab has: `make lab`");
    }
    let bundle = tempfile::tempdir().unwrap();
    let kernel = artefact(CLOUD.kernel);
    let script = format!(
        "set -- {} --cmdline '{WORDS}' --kernel {} --initrd {} --disk {},snapshot=on
\"$@\" --exec 'echo a guest; exit 7'; echo status $?
touch /anything 2>/dev/null || echo read-only; grep -h -e CapEff -e Seccomp: /proc/self/status",
        minivmm_tests::binary().display(),
        kernel.display(),
        artefact(CLOUD.initrd).display(),
        artefact("tools.img").display(),
    );
    let binary = minivmm_tests::binary();
    let cache = kernel.parent().unwrap().parent().unwrap();
    let directories = ["/usr", "/bin", "/lib", "/lib64"].map(Path::new);
    let directories = [&directories[..], &[binary.parent().unwrap(), cache]].concat();
    for directory in &directories {
        fs::create_dir_all(bundle.path().join("root").join(directory.strip_prefix("/").unwrap()))
            .unwrap();
    }
    for place in ["proc", "dev", "writable"] {
        fs::create_dir_all(bundle.path().join("root").join(place)).unwrap();
    }
    let config = container(&script, &directories).to_string();
    fs::write(bundle.path().join("config.json"), config).unwrap();

    let mut crun = Command::new("crun");
    crun.arg("--root").arg(bundle.path().join("state"));
    crun.args(["--cgroup-manager=disabled", "run", "-b"]).arg(bundle.path()).arg("minivmm-test");
    let ended = Session::start(&mut crun).wait(BOOT_BOUND).must_be(0);
    let output = String::from_utf8_lossy(&ended.output).replace('\t', " ");
    assert_eq!(
        output, "a guest\nstatus 7\nread-only\nCapEff: 0000000000000000\nSeccomp: 2\n",
        "{ended}"
    );
    let complaints = ended.errors.lines().filter(|line| line.starts_with("minivmm: "));
    let complaints: Vec<_> = complaints.collect();
    // The profile does not know io_uring.
    assert!(
        matches!(complaints[..], [one] if one.contains("this host does not allow io_uring")),
        "{ended}"
    );
}
