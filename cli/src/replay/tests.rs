//! What a load is made of, from traces as text.

use std::time::Duration;

use super::error::ReplayError;
use super::load::{IN_FLIGHT_MAX, Kind, Load};

fn line(time: u64, event: &str, fields: &str) -> String {
    format!("{{\"time_us\":{time}.5,\"event\":\"virtio_blk_{event}\",{fields}}}\n")
}

fn begin(time: u64, disk: &str, number: u64, kind: &str, sector: u64) -> String {
    let fields = format!(
        "\"disk\":\"{disk}\",\"req\":{number},\"kind\":\"{kind}\",\"sector\":{sector},\"nsectors\":8"
    );
    line(time, "handle_any", &fields)
}

fn about(time: u64, event: &str, number: u64) -> String {
    line(time, event, &format!("\"req\":{number}"))
}

fn read(trace: &str, disk: Option<&str>) -> Result<Load, ReplayError> {
    Load::read(trace.as_bytes(), disk)
}

/// For the fuzz target of traces: what a load promises, whatever the trace is.
pub(crate) fn keeps_its_bounds(trace: &[u8]) {
    let Ok(load) = Load::read(trace, None) else { return };
    let requests = &load.requests;
    assert!(!requests.is_empty() && requests.is_sorted_by_key(|request| request.begin));
    assert!(requests[0].begin.is_zero());
    for request in requests {
        assert!(usize::from(request.in_flight) <= IN_FLIGHT_MAX, "{request:?}");
        assert_eq!(request.kind == Kind::Flush, request.length == 0, "{request:?}");
    }
}

#[test]
fn a_request_has_its_time_with_the_engine_and_how_many_others_were_under_way() {
    let trace = [
        begin(100, "vda", 1, "Write", 16),
        begin(101, "vda", 2, "Read", 0),
        about(110, "submit", 1),
        about(112, "submit", 2),
        about(150, "rw_complete", 1),
        // A second piece.
        about(160, "rw_complete", 1),
        about(170, "req_complete", 1),
        begin(180, "vda", 3, "Flush", 0),
        begin(181, "vda", 4, "GetId", 0),
        begin(182, "vda", 5, "Discard", 8),
    ];
    let load = read(&trace.concat(), None).unwrap();
    let us = Duration::from_micros;
    let found: Vec<_> = load
        .requests
        .iter()
        .map(|request| (request.kind, request.offset, request.in_flight, request.begin))
        .collect();
    let expected = [
        (Kind::Write, 16 * 512, 0, us(0)),
        (Kind::Read, 0, 1, us(2)),
        (Kind::Flush, 0, 1, us(70)),
        (Kind::Discard, 8 * 512, 3, us(72)),
    ];
    assert_eq!(found, expected);
    let recorded: Vec<_> = load.requests.iter().map(|request| request.recorded).collect();
    assert_eq!(recorded, [Some(us(50)), None, None, None]);
    // A flush has none, whatever the trace says.
    let lengths: Vec<_> = load.requests.iter().map(|request| request.length).collect();
    assert_eq!(lengths, [4096, 4096, 0, 4096]);
}

#[test]
fn of_several_disks_one_is_chosen() {
    let trace = begin(1, "vda", 1, "Read", 0) + &begin(2, "vdb", 2, "Write", 8);
    let refused = |disk| read(&trace, disk).unwrap_err().to_string();
    assert!(refused(None).contains("vda and vdb; choose one by --traced-disk vda"));
    assert!(refused(Some("vdc")).contains("some of vda; write --traced-disk vda"));
    let load = read(&trace, Some("vdb")).unwrap();
    assert_eq!(load.requests.len(), 1);
    assert_eq!(load.requests[0].kind, Kind::Write);
}

/// Nor are ends that were lost waited for.
#[test]
fn requests_without_an_end_do_not_add_up() {
    let many = IN_FLIGHT_MAX as u64 + 10;
    let begun = |first: u64| -> String {
        (first..first + many).map(|number| begin(number, "vda", number, "Read", 0)).collect()
    };
    let lost = "{\"time_us\":1,\"event\":\"lost\",\"count\":7}\n";
    let load = read(&(begun(0) + lost + &begun(many)), None).unwrap();
    let most = load.requests.iter().map(|request| usize::from(request.in_flight)).max();
    assert_eq!(most, Some(IN_FLIGHT_MAX));
    assert_eq!(load.requests[many as usize].in_flight, 0);
    assert_eq!(load.lost, 7);
}

#[test]
fn numbers_that_are_no_requests_are_refused_or_left_out() {
    let huge = begin(1, "vda", 1, "Write", u64::MAX);
    let load = read(&huge, None).unwrap();
    assert_eq!(load.requests[0].offset, u64::MAX);
    for none in ["", "{\"time_us\":1,\"event\":\"virtio_notify\",\"req\":1}\n"] {
        assert!(matches!(read(none, None), Err(ReplayError::NoRequest)), "{none}");
    }
    for bad in ["x", "{}", "[]", "{\"event\":\"lost\"}", "{\"time_us\":-1,\"event\":\"lost\"}"] {
        assert!(matches!(read(bad, None), Err(ReplayError::Lines(_))), "{bad}");
    }
    // A number that the trace uses twice, and ends of what has not begun.
    let twice = begin(1, "vda", 1, "Read", 0) + &begin(2, "vda", 1, "Read", 8);
    let ends = about(0, "req_complete", 1) + &twice + &about(0, "rw_complete", 1);
    let load = read(&(ends + &about(0, "req_complete", 1)), None).unwrap();
    assert!(load.requests.iter().all(|request| request.recorded.is_none()));
}
