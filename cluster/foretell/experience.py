"""What earlier runs have shown, for the forecast of a request; what a request's own runs show is kept for the next."""

from contextlib import suppress

from cluster import placement as placements
from cluster.carry.decide import SuiteState
from cluster.carry.plan import Plan, Request
from cluster.foretell.forecast import Forecast, hardware_of, runs_of
from imgcls import rates
from imgcls.data.cache import is_cached
from imgcls.errors import DataError, StorageError
from imgcls.records import Placement, SuiteResults


def cached_sets(plan: Plan) -> list[str]:
    """Decoded sets that lie on this node, as `rates.decoding_of` names them."""
    return [rates.decoding_of(*decoded) for decoded in plan.decoded_sets(plan.configs) if is_cached(*decoded)]


def forecast_of(
    plan: Plan, state: SuiteState, nodes: list[placements.Node], placement: Placement, *, defined: bool = False
) -> Forecast:
    """By what is known of the hardware at hand. defined: nodes of a file; the runs are as quick as on this machine."""
    known, at_hand = rates.known(), placement
    if defined and not placements.local_node().gpus:
        at_hand = placement.model_copy(update={"gpus_per_worker": 0.0})
    hardware = hardware_of([placements.local_node()] if defined else nodes, at_hand, known)
    runs = runs_of(plan, state, at_hand, known, hardware, () if defined else cached_sets(plan))
    return Forecast(state, placement, known, hardware, placements.how_many_fit(nodes, placement), runs)


def keep_rates(request: Request, plan: Plan, results: SuiteResults, cached: list[str], *, session_s: float) -> None:
    """cached: as `cached_sets` said before the runs. session_s: of the command beside its runs."""
    with suppress(StorageError, DataError):  # what cannot be read or kept is no reason to fail now
        done = [run for run in results.finished if run.name in results.took and run.val]
        shown = list[rates.Rate]()
        decode_s: dict[tuple[str, str, int], float] = {}
        for run in done:
            was_whole = len(request.suite.run(run.name).attempts()) == 1
            shown += rates.rates_of(run, took_s=results.took[run.name] if was_whole else None)
            for manifest, px, channels in plan.decoded_sets([run.name]):
                decoded = rates.decoding_of(manifest, px=px, channels=channels)
                if decoded not in cached:
                    key = decoded, rates.hardware_name(run.hardware), manifest.num_samples
                    decode_s[key] = max(run.seconds["cache"], decode_s.get(key, 0.0))  # who waited for a lock was quicker
        shown += [rates.new("decode", of, where, count / s, "run") for (of, where, count), s in decode_s.items() if s]
        if done:
            shown.append(rates.new("session", "", rates.hardware_name(done[0].hardware), session_s, "run"))
        rates.keep(shown)
