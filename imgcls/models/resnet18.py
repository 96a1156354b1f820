"""torchvision's ResNet-18, untrained, for gray or RGB, and the way from a gray one to an RGB one."""

from torch import Tensor, nn

LUMINANCE = (0.299, 0.587, 0.114)
"""Red, green, blue to gray, ITU-R 601: what Pillow's "L" takes."""


def resnet18(*, channels: int, num_classes: int, dropout: float) -> nn.Module:
    """Input (b, channels, px, px). The published stem: 7x7, stride 2, and a max-pool."""
    from torchvision.models import resnet18 as torchvision_resnet18

    network = torchvision_resnet18(weights=None, num_classes=num_classes)
    if channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    # Indexed alike with and without dropout, so that weights fit from one to the other.
    network.fc = nn.Sequential(nn.Dropout(dropout), network.fc)  # type: ignore[assignment]
    return network


def transferred(source: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """`into` with the source's features; the classifier stays new, a gray `conv1` is inflated where `into` is RGB.

    Both are state_dicts of ResNet-18. Whether all features fit is for `load_state_dict` to say.
    """
    features = {name: weight for name, weight in source.items() if not name.startswith("fc.")}
    first = "conv1.weight"
    if features[first].shape[1] == 1 and into[first].shape[1] == 3:
        # (out, 1, k, k) -> (out, 3, k, k): on an RGB image what the gray kernel computes on its gray version.
        features[first] = features[first] * features[first].new_tensor(LUMINANCE).view(1, 3, 1, 1)
    return into | features
