//! Injected faults (`fault=`) as a Linux guest sees them.

use std::time::Duration;

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest, Report};
use minivmm_tests::qmp::Qmp;
use serde_json::{Value, json};

/// Each kind has a MiB of this disk for itself.
const FAULTY: &str = "id=faulty,werror=report,fault=error:read:sectors=0-7,fault=error:sectors=2048-2055,\
    fault=error:nospace:sectors=4096-4103,fault=torn:sectors=6144-6151,fault=lost:write:sectors=8192-8199,\
    fault=flip:sectors=10240-10247,fault=misdirected:to=14336:sectors=12288-12295,\
    fault=delay:ms=1500:read:sectors=16384-16391,fault=error:read:sectors=18432-18439:until-written,\
    fault=hang:sectors=20480-20487,fault=lost:flush:n=1";

/// `reads` and `writes` are of 4 KiB at a MiB of a disk; `xs` is how many bytes of it are as `writes` wrote them.
const SCRIPT: &str = r#"
reads() { dd if=/dev/$1 of=/run/read bs=4k skip=$(($2 * 256)) count=1 iflag=direct 2>/run/errors; }
head -c 4096 /dev/zero | tr '\0' x >/run/xs
writes() { dd if=/run/xs of=/dev/$1 bs=4k seek=$(($2 * 256)) count=1 oflag=direct conv=notrunc 2>/run/errors; }
xs() { reads $1 $2; tr -dc x </run/read | wc -c; }

reads vdc 0; fact read-error $? $(grep -c 'Input/output error' /run/errors)
writes vdc 1; fact write-error $? $(grep -c 'Input/output error' /run/errors)
writes vdc 2; fact no-space $? $(grep -c 'Input/output error' /run/errors)
writes vdc 3; fact torn $? $(xs vdc 3)
writes vdc 4; fact lost $? $(xs vdc 4)
fio --name=verify --filename=/dev/vdc --offset=4m --size=4k --bs=4k --rw=write --direct=1 --verify=crc32c --do_verify=1 >/dev/null 2>&1
fact verified $?
reads vdc 5; fact flip $? $(tr -d '\0' </run/read | wc -c)
writes vdc 6; fact misdirected $? $(xs vdc 6) $(xs vdc 7)
reads vdc 9; fact bad $?
writes vdc 9; fact healed $? $(xs vdc 9)
now() { read -r up rest </proc/uptime; echo ${up%.*}${up#*.}; }
before=$(now); reads vdc 8; fact delay $? $(($(now) - before))
dd if=/run/xs of=/dev/vdc bs=4k seek=3000 conv=notrunc,fsync 2>/dev/null; fact lost-flush $?
dmesg | grep 'I/O error, dev vdc' >/run/complaints
result /run/complaints

writes vdd 1; fact ignore-write $?
reads vdd 2; fact ignore-read $?
writes vde 1; fact stop-write $? $(xs vde 1)
reads vde 2; fact stop-read $?
writes vdf 1; fact enospc-stop $? $(xs vdf 1)
writes vdf 2; fact enospc-report $?

fact ready for a flush that fails
while dd if=/run/xs of=/dev/vdc bs=4k seek=3000 conv=notrunc,fsync 2>/run/errors; do sleep 0.1; done
fact flush-error $(grep -c 'Input/output error' /run/errors)
echo 2 >/proc/sys/kernel/hung_task_timeout_secs
# Linux does not complain of direct I/O that takes long.
dd if=/run/xs of=/dev/vdc bs=4k seek=2560 conv=notrunc,fsync 2>/dev/null &
writer=$!
until dmesg | grep -q "task dd:$writer blocked for more than"; do sleep 0.2; done
writes vdc 11; fact others $?
fact hung $(cut -d ' ' -f 3 /proc/$writer/stat)
wait $writer; fact hang $?
"#;

#[test]
fn linux_sees_each_kind_of_fault() {
    let guest = Guest::new(CLOUD, SCRIPT)
        .with("--qmp unix:control.sock")
        .with_tools()
        .with_results()
        .with_disk("faulty", 16 << 20, FAULTY)
        .with_disk(
            "ignore",
            16 << 20,
            "rerror=ignore,werror=ignore,fault=error:sectors=2048-2055,fault=error:read:sectors=4096-4103",
        )
        .with_disk(
            "stop",
            16 << 20,
            "rerror=stop,werror=stop,fault=error:sectors=2048-2055:once,fault=error:read:sectors=4096-4103:once",
        )
        .with_disk(
            "enospc",
            16 << 20,
            "werror=enospc,fault=error:nospace:sectors=2048-2055:once,fault=error:sectors=4096-4103:once",
        );
    let session = guest.start();
    let mut qmp = Qmp::connect(&guest.path("control.sock"));
    qmp.set_bound(BOOT_BOUND);
    for status in ["failed", "failed", "nospace"] {
        qmp.event("STOP");
        assert_eq!(qmp.query("query-status")["status"], "io-error");
        let disks = qmp.query("query-block");
        let statuses: Vec<_> =
            disks.as_array().unwrap().iter().map(|disk| &disk["io-status"]).collect();
        assert!(statuses.contains(&&json!(status)), "{statuses:?}");
        qmp.query("cont");
    }
    session.expect("fact: ready", BOOT_BOUND);
    let mut execute = |command: &str, mut arguments: Value| {
        arguments["device"] = "faulty".into();
        qmp.execute(command, arguments).unwrap()
    };
    let flushes = execute("x-minivmm-fault-add", json!({"rule": "error:flush"}));
    session.expect("fact: flush-error 1", BOOT_BOUND);
    execute("x-minivmm-fault-remove", flushes);
    session.expect("fact: hung D", BOOT_BOUND);
    let faults = qmp.query("x-minivmm-query-faults");
    let of_disk =
        faults.as_array().unwrap().iter().find(|disk| disk["device"] == "faulty").unwrap();
    let hits = |rule: &Value| rule["hits"].as_u64().unwrap();
    let unhit: Vec<_> =
        of_disk["rules"].as_array().unwrap().iter().filter(|rule| hits(rule) == 0).collect();
    assert!(unhit.is_empty(), "{unhit:?}");
    let hang = of_disk["rules"]
        .as_array()
        .unwrap()
        .iter()
        .find(|rule| rule["rule"].as_str().unwrap().starts_with("hang"));
    let hang = &hang.unwrap()["id"];
    qmp.execute("x-minivmm-fault-remove", json!({"device": "faulty", "id": hang})).unwrap();
    let report = Report::new(session.wait(BOOT_BOUND).must_be(0));

    for (name, value) in [
        ("read-error", "1 1"),
        ("write-error", "1 1"),
        ("no-space", "1 1"),
        ("torn", "0 2048"),
        ("lost", "0 0"),
        ("verified", "1"),
        ("flip", "0 1"),
        ("misdirected", "0 0 4096"),
        ("bad", "1"),
        ("healed", "0 4096"),
        ("lost-flush", "0"),
        ("ignore-write", "0"),
        ("ignore-read", "0"),
        ("stop-write", "0 4096"),
        ("stop-read", "0"),
        ("enospc-stop", "0 4096"),
        ("enospc-report", "1"),
        ("others", "0"),
        ("hang", "0"),
    ] {
        assert_eq!(report.get(name), value, "{name}: {}", report.ended);
    }
    let (status, centiseconds) = report.get("delay").split_once(' ').unwrap();
    let delay = Duration::from_millis(10 * centiseconds.parse::<u64>().unwrap());
    // Two ticks of the guest's clock are lost in rounding.
    assert!(status == "0" && delay >= Duration::from_millis(1480), "{delay:?}");
    let complaints = &guest.results()[0];
    let sectors: Vec<_> = complaints
        .lines()
        .filter_map(|line| Some(line.split_once("sector ")?.1.split_once(" flags")?.0))
        .collect();
    let expected =
        ["0 op 0x0:(READ)", "2048 op 0x1:(WRITE)", "4096 op 0x1:(WRITE)", "18432 op 0x0:(READ)"];
    assert!(expected.iter().all(|sector| sectors.contains(sector)), "{complaints}");
    assert_eq!(sectors.len(), complaints.lines().count(), "{complaints}");
}
