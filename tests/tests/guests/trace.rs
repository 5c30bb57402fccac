//! A trace of fio in a Linux guest, as Perfetto reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use minivmm_tests::linux::{CLOUD, Guest};
use minivmm_tests::perfetto::{Slice, Trace};
use serde_json::Value;

const REQUESTS: u64 = 1000;
const BLOCK: u64 = 4096;
/// Where fio's part of the disk begins: nothing else reads it.
const OFFSET: u64 = 16 << 20;

/// fio's sectors, by where its requests begin.
fn sectors() -> BTreeSet<u64> {
    (0..REQUESTS).map(|block| (OFFSET + block * BLOCK) / 512).collect()
}

#[test]
fn every_request_of_fio_has_its_stations_in_order() {
    // The block layer does not make one request of two neighbors.
    let script = format!(
        "echo 2 >/sys/block/vdb/queue/nomerges\n\
         fio --name=traced --filename=/dev/vdb --offset={OFFSET} --size={} --rw=randrw --bs={BLOCK} --direct=1 \
         --ioengine=libaio --iodepth=8 --randseed=1 --output-format=json >/run/fio.json\n\
         fact fio $?\nresult /run/fio.json\n",
        REQUESTS * BLOCK
    );
    let guest = Guest::new(CLOUD, &script).with_tools().with_disk("disk", 64 << 20, "");
    let guest = guest.with("--trace *,-kvm_run_exit,file=trace,format=perfetto").with_results();
    let report = guest.run(0);
    assert_eq!(report.number("fio"), 0, "{}", report.ended);
    let fio: Value = serde_json::from_str(&guest.results()[0]).unwrap();
    let total = |kind: &str| fio["jobs"][0][kind]["total_ios"].as_u64().unwrap();
    assert_eq!(total("read") + total("write"), REQUESTS);

    let bytes = fs::read(guest.path("trace")).unwrap();
    println!("the trace has {} bytes", bytes.len());
    let trace = Trace::read(&bytes);
    assert!(trace.gaps.is_empty(), "{:?}", trace.gaps);
    let threads: BTreeSet<_> = trace.threads.values().map(String::as_str).collect();
    for name in ["vcpu-0", "disk-vda-0", "disk-vdb-0"] {
        assert!(threads.contains(name), "{name}: {threads:?}");
    }
    let (mut lives, mut interrupts) = (BTreeMap::<u64, Vec<&Slice>>::new(), BTreeMap::new());
    for slice in &trace.slices {
        if let Some(request) = slice.request() {
            lives.entry(request).or_default().push(slice);
        }
        for request in slice.requests() {
            assert!(interrupts.insert(request, slice).is_none(), "{request} has two interrupts");
        }
    }
    let is_fio = |life: &[&Slice]| {
        let sector = life[0].arguments.get("sector").and_then(Value::as_u64);
        life[0].arguments["disk"] == "vdb" && sector.is_some_and(|at| sectors().contains(&at))
    };
    lives.retain(|_, life| is_fio(life));
    let number = |slice: &Slice, key: &str| slice.arguments[key].as_u64().unwrap();
    let found: Vec<_> = lives.values().map(|life| number(life[0], "sector")).collect();
    assert_eq!(found.len() as u64, REQUESTS);
    assert_eq!(BTreeSet::from_iter(found), sectors(), "each block once");

    let mut kinds = BTreeMap::from([("read", 0), ("write", 0)]);
    for (request, life) in &lives {
        let names: Vec<_> = life.iter().map(|slice| &slice.name[..]).collect();
        let [first, "virtio_blk_submit", "virtio_blk_rw_complete", "virtio_blk_req_complete"] =
            names[..]
        else {
            panic!("{request}: {names:?}")
        };
        let kind = first.strip_prefix("virtio_blk_handle_").unwrap();
        *kinds.get_mut(kind).unwrap_or_else(|| panic!("{request}: {kind}")) += 1;
        assert!(life.is_sorted_by_key(|slice| slice.start), "{request}: {life:?}");
        assert_eq!((number(life[0], "nsectors"), number(life[3], "status")), (BLOCK / 512, 0));
        // From the ring to the used ring, with arrows, and with the engine in between.
        let flow = &trace.flows[request];
        let interrupt = interrupts.get(request).inspect(|slice| {
            assert!(slice.name == "virtio_notify" && slice.start >= life[3].end, "{slice:?}");
        });
        assert_eq!(flow.last().unwrap().0 == "f", interrupt.is_some(), "{request}: {flow:?}");
        assert!((5..=6).contains(&(flow.len() + usize::from(interrupt.is_none()))), "{flow:?}");
        let (engine, from, until) = &trace.spans[request];
        assert_eq!(engine, "disk-vdb-0 engine");
        assert!(life[1].start <= *from && *until <= life[3].end, "{request}: {life:?}");
    }
    assert_eq!(kinds, BTreeMap::from([("read", total("read")), ("write", total("write"))]));
    assert!(lives.keys().any(|request| interrupts.contains_key(request)));
}
