"""The small convolutional network of the published comparison: 2,192,650 parameters at 64 px gray and ten classes."""

from torch import nn


def basic_cnn(*, px: int, channels: int, num_classes: int, dropout: float) -> nn.Module:
    """Three times convolution 3x3, ReLU and max-pool 2, then two linear layers. Input (b, channels, px, px)."""
    layers: list[nn.Module] = []
    for wider in (32, 64, 128):
        layers += [nn.Conv2d(channels, wider, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = wider
    layers += [nn.Flatten(), nn.Linear(channels * (px // 8) ** 2, 256), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))
