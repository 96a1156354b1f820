"""`bench calibrate`: rates of this machine in some ten seconds, by processes side by side as runs are."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from cluster import placement as placements
from cluster.carry.run import silence_libraries
from imgcls import rates, storage
from imgcls.cpus import usable_cpus
from imgcls.data.shards import manifest_url, read_manifest
from imgcls.rates import Rate, What
from imgcls.recipe import Recipe
from imgcls.records import Placement, RunOptions
from imgcls.training import environment

SECONDS = 10.0
"""After imports, all together."""
IMPORTS_OF_A_RUN, IMPORTS_OF_A_COMMAND = 7.0, 2.0
"""What a run takes beside its training, and a command beside its runs, in imports of Lightning: that is most of what their
processes do. By records of suites; none is started here, so these two are guesses, until a run has shown them."""
GUESSED = ("overhead", "session")

Values = dict[tuple[What, str], float]


def calibrate(recipes: Sequence[Recipe], data_url: str) -> list[Rate]:
    """Of each kind of work in these recipes, and of decoding their sets where they are packed; medians over processes."""
    node = placements.local_node()
    placement = placements.choose([node], RunOptions())
    side_by_side = min(placements.how_many_fit([node], placement), len(recipes))
    with ProcessPoolExecutor(side_by_side, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_measure, tuple(recipes), placement, data_url, side_by_side) for _ in range(side_by_side)]
        processes = [future.result() for future in futures]
    hardware = rates.hardware_name(environment.hardware())
    return [_median(what, of, hardware, [values[what, of] for values in processes]) for what, of in processes[0]]


def _median(what: What, of: str, hardware: str, values: Sequence[float]) -> Rate:
    return rates.new(what, of, hardware, statistics.median(values), "guess" if what in GUESSED else "calibrate")


def _measure(recipes: Sequence[Recipe], placement: Placement, data_url: str, side_by_side: int) -> Values:
    """Runs in a process of its own, beside others that do the same."""
    began = time.perf_counter()
    from jobs._training_rates import decoding_rate, training_rates

    silence_libraries(False)
    import_s = time.perf_counter() - began
    values: Values = {
        ("overhead", rates.overhead_of(placement)): import_s * IMPORTS_OF_A_RUN,
        ("session", ""): import_s * IMPORTS_OF_A_COMMAND,
    }
    works = {rates.work_of(recipe, placement): recipe for recipe in recipes}
    sets = {(r.dataset, r.input.stored_px, r.input.channels) for r in recipes}
    accelerator = "gpu" if placement.gpus_per_worker else "cpu"
    threads, each_s = max(1, int(placement.cpus_per_worker)), 0.8 * SECONDS / len(works)
    for work, recipe in works.items():
        train, evaluate = training_rates(recipe, accelerator=accelerator, threads=threads, seconds=each_s)
        values |= {("train", work): train, ("evaluate", work): evaluate}
    for dataset, px, channels in sorted(sets):
        set_url = storage.join(data_url, dataset)
        if storage.exists(manifest_url(set_url)):
            manifest = read_manifest(set_url)
            alone = decoding_rate(set_url, manifest, px=px, channels=channels, seconds=0.1 * SECONDS / len(sets))
            # A process a core, and the other runs have their share of them.
            rate = alone * usable_cpus() / side_by_side
            values["decode", rates.decoding_of(manifest, px=px, channels=channels)] = rate
    return values
