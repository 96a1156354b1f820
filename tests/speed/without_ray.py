"""`python -m tests.speed.without_ray DATA RUN RECIPE [FIELD=VALUE...]`: our `fit` in this process, with one thread."""

import sys

import torch

from cluster.carry.run import silence_libraries
from imgcls import storage
from imgcls.catalogue import recipe_of
from imgcls.data.shards import read_manifest
from imgcls.recipe import derive, parse_changes
from imgcls.records import RunConfig
from imgcls.training.fit import fit
from imgcls.training.world import World

if __name__ == "__main__":
    data_url, run_url, name, *changes = sys.argv[1:]
    silence_libraries(False)
    torch.set_num_threads(1)
    recipe = derive(recipe_of("quick", name), parse_changes(tuple(changes)))
    digest = read_manifest(storage.join(data_url, recipe.dataset)).digest
    config = RunConfig(catalogue="quick", recipe=recipe, seed=0, data_digest=digest, init=None, synthetic=False)
    fit(config, data_url=data_url, run_url=run_url, world=World())
