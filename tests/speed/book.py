"""Training as the guides of Lightning and of Ray Train show it: a script, and what writes down when its first step ended.

`python -m tests.speed.book IMAGES FIRST 0` is plain Lightning; a number of workers in place of 0 is Ray Train with them.
"""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from imgcls.models.basic_cnn import basic_cnn

BATCH = 128


class FirstStep(pl.Callback):
    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == 1:
            Path(self.file).touch()


class Network(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = basic_cnn(px=64, channels=1, num_classes=10, dropout=0.3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(config: dict[str, Any]) -> None:
    steps = [transforms.Grayscale(), transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()]
    dataset = ImageFolder(config["images"], transforms.Compose(steps))
    # So that two workers together take the batch of one.
    loader = DataLoader(dataset, BATCH // max(1, config["workers"]), shuffle=True, num_workers=2, drop_last=True)
    given: dict[str, Any] = {}
    if config["workers"]:
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        given = {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()]}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices="auto" if config["workers"] else 1, callbacks=[FirstStep(config["first"])],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, **given,
    )  # fmt: skip
    if config["workers"]:
        from ray.train.lightning import prepare_trainer

        trainer = prepare_trainer(trainer)
    trainer.fit(Network(), loader)


def main(images: str, first: str, workers: int) -> None:
    config = {"images": images, "first": first, "workers": workers}
    if not workers:
        return train(config)
    import ray.train
    from ray.train.torch import TorchTrainer

    run = ray.train.RunConfig(storage_path=str(Path(first).parent / "ray"))
    scaling = ray.train.ScalingConfig(num_workers=workers)
    TorchTrainer(train, train_loop_config=config, scaling_config=scaling, run_config=run).fit()
    return None


if __name__ == "__main__":
    # By its name, so that Ray's workers can import what it holds.
    from tests.speed import book

    book.main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
