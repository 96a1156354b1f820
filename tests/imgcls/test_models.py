import pytest
import torch

from imgcls.catalogue import paper, quick
from imgcls.data.augment import inputs
from imgcls.errors import CheckpointError
from imgcls.models.build import build_model, start_from
from imgcls.models.resnet18 import LUMINANCE


def test_basic_cnn_has_the_published_number_of_parameters():
    network = build_model(paper.BASIC_CNN, num_classes=10, seed=0)
    assert sum(p.numel() for p in network.parameters()) == 2_192_650


def test_first_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = build_model(quick.RESNET18, num_classes=10, seed=3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    second = build_model(quick.RESNET18, num_classes=10, seed=3).state_dict()
    other = build_model(quick.RESNET18, num_classes=10, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_an_inflated_network_computes_on_rgb_what_its_source_computes_on_gray():
    source = build_model(quick.RESNET18, num_classes=10, seed=0)
    target = build_model(quick.FINETUNED, num_classes=10, seed=1)
    start_from(target, source.state_dict(), source="resnet18")
    rgb = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    x = inputs(rgb, quick.FINETUNED.input)
    gray = (x * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    for network in (source, target):
        network.eval()
        network.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(target(x), source(gray), atol=1e-4)


def test_the_classifier_of_a_transferred_network_is_new_and_has_its_own_classes():
    source = build_model(quick.RESNET18, num_classes=10, seed=0)
    target = build_model(quick.FINETUNED, num_classes=3, seed=1)
    before = target.state_dict()["fc.1.weight"].clone()
    start_from(target, source.state_dict(), source="resnet18")
    assert torch.equal(target.state_dict()["fc.1.weight"], before)
    assert torch.equal(target.state_dict()["layer1.0.conv1.weight"], source.state_dict()["layer1.0.conv1.weight"])


def test_weights_of_another_network_are_refused():
    other = build_model(quick.BASIC_CNN, num_classes=10, seed=0)
    with pytest.raises(CheckpointError, match="cannot be the start"):
        start_from(build_model(quick.FINETUNED, num_classes=10, seed=0), other.state_dict(), source="basic-cnn")
