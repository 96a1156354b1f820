"""Several hosts with addresses, links and disks of their own: runs sent to them, links cut, hosts lost. Root is needed.

One command, and its record: `python -m pytest tests/proof/test_hosts.py --proof --record`
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgcls.data import shards
from imgcls.data.synthetic import synthetic_source
from sandbox.hosts import why_not
from tests.conftest import run_in
from tests.processes import until
from tests.proof.commands import assert_same, result_in, start
from tests.proof.over_hosts import BUCKET, LATENCY_S, WORKERS, Site, site_of_hosts

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("only_in_full")]

CUT_S = 10
MBIT = 100
BUCKETS = ("--data", "s3://data/packed", "--storage", "s3://runs")
TINY = ("length.epochs=1", "train_fraction=1.0", "global_batch_size=90", "input.px=32", "input.stored_px=32")
"""Of the catalogue quick: three steps."""
COMMITTED = ("length.epochs=6", "train_fraction=1.0", "global_batch_size=64", "input.px=16", "input.stored_px=16")
BASIC_CNN = ("--set", 'model={"kind": "basic-cnn", "dropout": 0.3}')


def sets(*changes: str) -> tuple[str, ...]:
    return tuple(word for change in changes for word in ("--set", change))


STEPS = (*sets(*COMMITTED), *BASIC_CNN, "--checkpoint-every-n-steps", "1", "--num-workers", "2")
"""24 steps of `regularized`, each committed, by two workers."""
RUN = "regularized-seed0"


@pytest.fixture(scope="module")
def site(only_in_full: None, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := why_not():
        pytest.skip(reason)
    with site_of_hosts(tmp_path_factory.mktemp("site")) as one:
        one.upload(packed, "s3://data/packed")
        yield one


@pytest.fixture(scope="module")
def on_one_host(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 steps by two workers of a local Ray."""
    halves = ("--cpus-per-worker", "0.5")
    running = start(tmp_path_factory.mktemp("one"), "train", "regularized", "--data", packed, *STEPS, *halves, run=RUN)
    running.wait()
    return running.run


def train(site: Site, id: str) -> tuple:
    """The 24 steps, sent to the hosts: the command, and the run's steps."""
    sent = site.submit("train", "regularized", *BUCKETS, "--id", id, *STEPS)
    return sent, site.watch(f"{id}/{RUN}")


def attempts_of(run: Path) -> int:
    return len(list((run / "attempts").iterdir()))


@pytest.mark.parametrize(("num_workers", "recipes"), [(2, ""), (3, "resnet18,finetuned")])
def test_a_suite_sent_from_another_host_has_the_bits_of_one_host(
    num_workers: int, recipes: str, site: Site, packed: Path, tmp_path: Path, proved
):
    flags = ("--num-workers", str(num_workers), *sets(*TINY), *(("--recipes", recipes) if recipes else ()))
    sent, used = site.submit("suite", *BUCKETS, "--id", f"suite-{num_workers}", *flags), set[tuple[str, ...]]()
    while sent.process.poll() is None:
        used.add(tuple(site.hosts_of_workers()))
        time.sleep(0.2)
    sent.wait()
    assert max(map(len, used)) >= num_workers, used
    local = ("suite", "--data", packed, "--storage", "runs", "--id", "one", *flags, "--cpus-per-worker", "0.5")
    done = run_in(tmp_path, *local, env={"RAY_ADDRESS": ""}, timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    over, one = site.fetch(f"suite-{num_workers}"), tmp_path / "runs" / "one"
    runs = sorted(path.parent.name for path in one.glob("*/result.json"))
    assert len(runs) == (2 if recipes else 5)
    for run in runs:
        assert result_in(over / run).status == "finished"
        assert attempts_of(over / run) == 1
        assert_same(over / run, one / run)
    what = f"{', '.join(runs)}: {num_workers} workers, each on a host of its own, as {num_workers} on one host"
    proved("suite sent from another host, DDP over hosts", what, n=len(runs))


def test_the_doctor_names_the_interface_and_a_wrong_one_is_a_fault(site: Site, proved):
    (right,), healthy = all_reduce(site)
    assert healthy
    assert right["found"].endswith(", by eth0"), right
    # One alone is no fault on 10.x: gloo connects from the higher address to the lower one, and 127.0.0.1 is the higher.
    restart(site, *WORKERS[1:], GLOO_SOCKET_IFNAME="lo")
    (wrong,), _ = all_reduce(site)
    restart(site, *WORKERS[1:])
    assert not wrong["ok"]
    assert "GLOO_SOCKET_IFNAME" in wrong["remedy"]
    proved("jobs.doctor over hosts: all-reduce", right["found"])
    proved("jobs.doctor over hosts: a fault", f"GLOO_SOCKET_IFNAME=lo on two hosts: {wrong['found']}")


def all_reduce(site: Site) -> tuple[list[dict], bool]:
    """The check, and whether no other one found a fault."""
    code, checks = site.doctor()
    faults = {name for name, some in checks.items() if not all(check["ok"] for check in some)}
    assert (code, faults <= {"all-reduce"}) == (3 if faults else 0, True), checks
    return checks["all-reduce"], not faults


def restart(site: Site, *names: str, **env: str) -> None:
    for host in names:
        site.hosts.crash(host)
    gone = {site.hosts.address(host) for host in names}
    until(lambda: not gone & site.nodes(), 180, f"the head to take {names} for dead")
    for host in names:
        site.hosts.boot(host)
    site.join(*names, **env)


def test_a_link_that_is_cut_for_ten_seconds_costs_no_restart(site: Site, on_one_host: Path, proved):
    sent, steps = train(site, "cut")
    steps.wait_for(4)
    victim = site.hosts_of_workers()[-1]
    site.hosts.cut(victim)
    time.sleep(CUT_S)
    site.hosts.heal(victim)
    healed, last = time.time(), steps.seen[-1][1]
    assert last < 24, "the run ended before the link was cut"
    seconds = steps.wait_for(last + 1) - healed
    sent.wait()
    run = site.fetch("cut") / RUN
    assert attempts_of(run) == 1
    assert_same(run, on_one_host)
    proved(f"a worker's link cut for {CUT_S} s", f"one attempt, the next step {seconds:.1f} s after it healed")


@pytest.mark.parametrize("heard", [True, False], ids=["its connections end", "in silence"])
def test_a_host_that_crashes_is_replaced_by_another_and_the_run_ends_with_the_same_bits(
    heard: bool, site: Site, on_one_host: Path, proved
):
    sent, steps = train(site, f"crash-{heard}")
    steps.wait_for(4)
    before = site.hosts_of_workers()
    victim = before[0 if heard else 1]
    if not heard:
        site.hosts.cut(victim)
    site.hosts.crash(victim)
    crashed = time.time()
    last = steps.seen[-1][1]
    (spare,) = set(WORKERS) - set(before)
    dead_s = until(lambda: site.hosts.address(victim) not in site.nodes(), 180, "the head to take the host for dead")
    seconds = steps.wait_for(last + 1, attempt=2) - crashed
    assert spare in site.hosts_of_workers() or sent.process.poll() is not None
    sent.wait()
    site.hosts.boot(victim)
    site.join(victim)
    run = site.fetch(f"crash-{heard}") / RUN
    assert attempts_of(run) == 2
    assert_same(run, on_one_host)
    kind = "its connections end" if heard else "in silence: its link is cut for good"
    spent = f"taken for dead after {dead_s:.0f} s, the next step with another host after {seconds:.1f} s"
    proved(f"a host of two crashed, {kind}", spent)


def test_a_slow_bucket_bounds_the_first_epoch_alone(site: Site, tmp_path: Path, proved):
    shards.pack(synthetic_source("imagenette", 1500), str(tmp_path / "imagenette"), name="imagenette")
    site.upload(tmp_path / "imagenette", "s3://data/larger/imagenette")
    num_mb = sum(file.stat().st_size for file in (tmp_path / "imagenette").rglob("*")) / 1e6
    changes = sets("length.epochs=4", "global_batch_size=64", "input.px=32", "input.stored_px=32")
    words = ("train", "basic-cnn", "--data", "s3://data/larger", "--storage", "s3://runs", *changes)
    first, later = dict[str, float](), dict[str, float]()
    for kind in ("far", "near"):
        site.hosts.rate(BUCKET, MBIT if kind == "far" else None)
        endpoint = getattr(site, kind)["AWS_ENDPOINT_URL"]
        sent = site.submit(*words, "--id", kind, env=(f"AWS_ENDPOINT_URL={endpoint}", f"IMGCLS_CACHE=/mnt/{kind}"))
        sent.wait()
        run = site.fetch(kind) / "basic-cnn-seed0"
        rows = [row.split(",") for row in (run / "timing.csv").read_text().splitlines()[1:]]
        first[kind] = result_in(run).seconds["cache"] + float(rows[0][1])
        later[kind] = statistics.median(float(row[3]) for row in rows[1:])
    link_s, ratio = num_mb * 8 / MBIT, later["far"] / later["near"]
    assert first["far"] > link_s
    assert ratio > 0.6
    proved(
        f"bucket at {LATENCY_S * 1e3:.0f} ms and {MBIT} Mbit/s",
        f"{num_mb:.0f} MB take {link_s:.1f} s at that rate; first epoch with the images fetched and decoded "
        f"{first['far']:.1f} s, without a limit {first['near']:.1f} s; later epochs {later['far']:.0f} images/s, without a "
        f"limit {later['near']:.0f}: {ratio:.2f} of it",
    )


def test_what_ddp_over_hosts_costs_beside_one_worker_a_run(site: Site, proved):
    flags = (*BUCKETS, "--recipes", "scratch", *sets(*TINY), "--set", "length.epochs=2")
    rates = dict[str, list[float]]()
    for kind, more in (("parallel", ("--num-seeds", "2")), ("ddp", ()), ("slow-ddp", ())):
        for host in WORKERS:
            site.hosts.rate(host, MBIT if kind == "slow-ddp" else None)
        workers = "1" if kind == "parallel" else "2"
        site.submit("suite", *flags, "--num-workers", workers, *more, "--id", f"cost-{kind}").wait()
        runs = sorted(site.fetch(f"cost-{kind}").glob("*/result.json"))
        rates[kind] = [result_in(run.parent).images_per_s or 0.0 for run in runs]
    for host in WORKERS:
        site.hosts.rate(host, None)
    assert rates["slow-ddp"][0] < rates["ddp"][0]
    proved(
        "scratch, a ResNet-18, over hosts, images/s",
        f"two runs of one worker in parallel {rates['parallel']}; one run of two workers {rates['ddp']}, with links of "
        f"{MBIT} Mbit/s {rates['slow-ddp']}",
    )
