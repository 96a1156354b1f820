import pytest

from cluster.placement import choose, how_many_fit
from imgcls.errors import PlacementError
from imgcls.records import Placement

TWO_CORES = {"CPU": 2.0, "GPU": 0.0}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}


def chosen(nodes, workers=1, cpus=None, gpus=None):
    return choose(nodes, num_workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


def test_a_worker_has_a_gpu_where_there_are_any():
    assert chosen([TWO_CORES]).gpus_per_worker == 0
    assert chosen([TWO_CORES, GPU_NODE]).gpus_per_worker == 1
    assert chosen([GPU_NODE], gpus=0).gpus_per_worker == 0


@pytest.mark.parametrize(("workers", "cpus", "gpus"), [(3, None, None), (1, 3, None), (1, None, 1), (1, -1, None)])
def test_what_can_never_run_is_refused_with_what_there_is(workers, cpus, gpus):
    with pytest.raises(PlacementError):
        chosen([TWO_CORES], workers, cpus, gpus)


def test_the_refusal_names_both_sides():
    with pytest.raises(
        PlacementError, match=r"64 workers with 1 CPUs and 0 GPUs each can never run: .* has 2 CPUs and 0 GPUs"
    ):
        chosen([TWO_CORES], 64)


@pytest.mark.parametrize(
    ("nodes", "placement", "expected"),
    [
        ([TWO_CORES], Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0), 2),
        ([TWO_CORES], Placement(num_workers=4, cpus_per_worker=0.5, gpus_per_worker=0), 1),
        ([TWO_CORES, TWO_CORES], Placement(num_workers=3, cpus_per_worker=1, gpus_per_worker=0), 1),
        ([GPU_NODE] * 5, Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=1), 5),
        ([{"CPU": 3.0, "GPU": 0.0}] * 2, Placement(num_workers=1, cpus_per_worker=2, gpus_per_worker=0), 2),
    ],
)
def test_workers_are_counted_node_by_node(nodes, placement, expected):
    assert how_many_fit(nodes, placement) == expected
