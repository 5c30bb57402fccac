"""Drives a running minivmm with qemu.qmp, QEMU's own client library: every command, and the events that it causes.

Usage: qemu_qmp.py SOCKET. The VM writes to its disk `data` without end, and was started with --paused.
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient

executed = {"qmp_capabilities"}


async def main(path):
    client = QMPClient("test")
    with client.listener() as events:
        await client.connect(path)
        assert client.greeting.QMP.version["package"].startswith("minivmm-")

        async def execute(command, **arguments):
            executed.add(command)
            arguments = {name.replace("__", "-"): value for name, value in arguments.items()}
            return await client.execute(command, arguments)

        async def event(name):
            message = await asyncio.wait_for(events.get(), 30)
            assert message["event"] == name, message
            assert message["timestamp"]["seconds"] > 1_600_000_000
            return message.get("data")

        async def fails(error_class, command, **arguments):
            try:
                await execute(command, **arguments)
            except ExecuteError as error:
                assert error.error_class == error_class, error
            else:
                raise AssertionError(f"{command} did not fail")

        assert (await execute("query-version"))["qemu"]["major"] >= 9
        assert await execute("query-status") == {"running": False, "status": "prelaunch"}
        await execute("cont")
        await event("RESUME")
        assert await execute("query-status") == {"running": True, "status": "running"}
        await execute("stop")
        await event("STOP")
        assert (await execute("query-status"))["status"] == "paused"
        await execute("cont")
        await event("RESUME")

        cpus = await execute("query-cpus-fast")
        assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
        assert len({cpu["thread-id"] for cpu in cpus}) == 2
        assert await execute("query-memory-size-summary") == {"base-memory": 32 << 20, "plugged-memory": 0}

        (disk,) = await execute("query-block")
        (node,) = await execute("query-named-block-nodes", flat=True)
        # The guest writes meanwhile, and the image grows.
        for image in (node["image"], disk["inserted"]["image"]):
            del image["actual-size"]
        assert node == disk["inserted"]
        assert disk["device"] == "data" and disk["io-status"] == "ok"
        assert disk["inserted"]["drv"] == "raw" and not disk["inserted"]["ro"]
        size = disk["inserted"]["image"]["virtual-size"]
        await execute("block_resize", device="data", size=2 * size)
        (disk,) = await execute("query-block")
        assert disk["inserted"]["image"]["virtual-size"] == 2 * size
        await fails("DeviceNotFound", "block_resize", device="floppy", size=512)
        await fails("GenericError", "block_resize", device="data", size=1)

        limits = dict.fromkeys(["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"], 0)
        await execute("block_set_io_throttle", id="data", **{**limits, "iops": 5000, "iops_max": 10000})
        (disk,) = await execute("query-block")
        assert disk["inserted"]["iops"] == 5000 and disk["inserted"]["iops_max"] == 10000
        assert disk["inserted"]["group"] == "data"
        await execute("block_set_io_throttle", device="data", **limits)

        await execute("block-set-write-threshold", node__name="data", write__threshold=512)
        exceeded = await event("BLOCK_WRITE_THRESHOLD")
        assert exceeded["node-name"] == "data" and exceeded["write-threshold"] == 512
        assert exceeded["amount-exceeded"] % 512 == 0 and exceeded["amount-exceeded"] > 0

        await execute("block-latency-histogram-set", id="data", boundaries=[10_000, 10_000_000])
        while True:
            (stats,) = await execute("query-blockstats")
            stats = stats["stats"]
            bins = stats["wr_latency_histogram"]["bins"]
            if sum(bins) > 10:
                break
        assert len(bins) == 3 and stats["wr_operations"] >= sum(bins)
        assert stats["wr_bytes"] == 512 * stats["wr_operations"]

        metrics = (await execute("x-query-metrics"))["human-readable-text"]
        assert 'minivmm_disk_operations_total{disk="data",kind="write"}' in metrics

        rule = await execute("x-minivmm-fault-add", device="data", rule="hang:discard")
        (disk,) = await execute("x-minivmm-query-faults")
        assert disk == {"device": "data", "rules": [{**rule, "rule": "hang:discard", "seen": 0, "hits": 0}]}
        await execute("x-minivmm-fault-remove", device="data", **rule)

        assert await execute("query-name") == {}
        assert len((await execute("query-vm-generation-id"))["guid"]) == 36
        assert "filename" in (await execute("query-chardev"))[0]
        # Without --trace there are events, but none can be recorded.
        (state,) = await execute("trace-event-get-state", name="virtio_blk_handle_write")
        assert state["state"] == "unavailable"
        await execute("trace-event-set-state", **{"name": "*", "enable": True, "ignore-unavailable": True})
        for query in ["query-uuid", "query-kvm", "query-machines"]:
            assert await execute(query)
        for none in ["query-iothreads", "query-block-jobs", "query-jobs"]:
            assert await execute(none) == []

        commands = {command["name"] for command in await execute("query-commands")}
        known_events = {event["name"] for event in await execute("query-events")}
        schema = await execute("query-qmp-schema")
        described = {entry["name"]: entry for entry in schema}
        for kind, names in [("command", commands), ("event", known_events)]:
            assert names == {entry["name"] for entry in schema if entry["meta-type"] == kind}
        assert described[described["block_resize"]["arg-type"]]["meta-type"] == "object"
        await fails("CommandNotFound", "blockdev-add")
        executed.remove("blockdev-add")

        # A save, after which the guest goes on.
        events_on = [{"capability": "events", "state": True}]
        await execute("migrate-set-capabilities", capabilities=events_on)
        capabilities = await execute("query-migrate-capabilities")
        assert {"capability": "events", "state": True} in capabilities
        await execute("migrate", uri=f"file:{path}.saved")
        for status in ["setup", "active"]:
            assert await event("MIGRATION") == {"status": status}
        await event("STOP")
        assert await event("MIGRATION") == {"status": "completed"}
        saved = await execute("query-migrate")
        assert saved["status"] == "completed" and saved["ram"]["total"] == 32 << 20
        assert (await execute("query-status"))["status"] == "postmigrate"
        await execute("migrate_cancel")
        await execute("cont")
        await event("RESUME")
        await fails("GenericError", "migrate", uri="tcp:localhost:4444")
        await fails("GenericError", "migrate-incoming", uri=f"file:{path}.saved")
        # A dump, which stops the guest only meanwhile.
        await execute("dump-guest-memory", paging=False, protocol=f"file:{path}.dump")
        await event("STOP")
        await event("RESUME")
        assert (await execute("query-status"))["status"] == "running"
        await fails("GenericError", "dump-guest-memory", paging=True, protocol=f"file:{path}.dump")
        # Into a file that is handed over.
        with open(f"{path}.given", "wb+") as given:
            for name in ["unused", "given"]:
                client.send_fd_scm(given.fileno())
                await execute("getfd", fdname=name)
        await execute("closefd", fdname="unused")
        await execute("dump-guest-memory", paging=False, protocol="fd:given")
        await event("STOP")
        await event("RESUME")
        with open(f"{path}.appended", "ab") as given:
            client.send_fd_scm(given.fileno())
            await execute("getfd", fdname="appended")
        await fails("GenericError", "dump-guest-memory", paging=False, protocol="fd:appended")
        await event("STOP")
        await event("RESUME")
        with open(f"{path}.given", "rb") as given:
            assert given.read(4) == b"\x7fELF"

        # A disk has no medium that could be taken out.
        await fails("GenericError", "eject", device="vda")
        await fails("GenericError", "blockdev-change-medium", device="vda", filename="other.img")

        await execute("system_powerdown")
        await event("POWERDOWN")
        await client.disconnect()

        # Another client, which resets the machine, running and stopped, and then ends it.
        await client.connect(path)
        for status in ["running", "prelaunch"]:
            await execute("system_reset")
            assert await event("RESET") == {"guest": False, "reason": "host-qmp-system-reset"}
            assert (await execute("query-status"))["status"] == status
            if status == "running":
                await execute("stop")
                await event("STOP")
        await execute("quit")
        assert await event("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
        missed = commands - executed
        assert not missed, f"not tried: {missed}"
    try:
        await client.disconnect()
    except EOFError:
        pass


asyncio.run(main(sys.argv[1]))
print("qemu.qmp is content")
