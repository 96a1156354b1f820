"""A recipe's model -> an `nn.Module` with its first weights."""

from typing import assert_never

import torch
from torch import nn

from imgcls.errors import CheckpointError
from imgcls.models.basic_cnn import basic_cnn
from imgcls.models.resnet18 import resnet18, transferred
from imgcls.recipe import BasicCNN, Recipe, ResNet18


def build_model(recipe: Recipe, *, num_classes: int, seed: int) -> nn.Module:
    """First weights are a function of the seed alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        into, model = recipe.input, recipe.model
        match model:
            case BasicCNN():
                network = basic_cnn(px=into.px, channels=into.channels, num_classes=num_classes, dropout=model.dropout)
            case ResNet18():
                network = resnet18(channels=into.channels, num_classes=num_classes, dropout=model.dropout)
            case _:
                assert_never(model)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def start_from(network: nn.Module, weights: dict[str, torch.Tensor], *, source: str) -> None:
    """`network` begins with the source's features. Raises CheckpointError where they do not fit."""
    try:
        network.load_state_dict(transferred(weights, network.state_dict()))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source} cannot be the start of this network: {error}") from None
