"""Faults that a worker's own code has: a `sitecustomize` in front of its path changes a module when it is imported."""

from pathlib import Path

_HOOK = """
import contextlib, importlib.abc, importlib.util, sys, time

class Changed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "imgcls.training.module":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def changed(module):
            execute(module)
            change(module.Classifier)
        spec.loader.exec_module = changed
        return spec

def change(classifier):
    step = classifier.training_step
    def training_step(self, batch, batch_idx):
        if self.global_step == {step} and self.rank == {rank}:
            {fault}
        return step(self, batch, batch_idx)
    classifier.training_step = training_step

def hang_once():
    with contextlib.suppress(FileExistsError):
        open(__file__ + ".hung", "x").close()
        time.sleep(3600)

sys.meta_path.insert(0, Changed())
"""

RAISES = 'raise ValueError("planted")'
HANGS_ONCE = "hang_once()"
TURNS_NAN = 'batch = batch._replace(images=batch.images * float("nan"))'


def planted(folder: Path, fault: str, *, step: int, rank: int = 0) -> str:
    """A folder for the head of PYTHONPATH, in whose processes rank `rank` has this fault in step `step` (from 0)."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(
        _HOOK.replace("{step}", str(step)).replace("{rank}", str(rank)).replace("{fault}", fault)
    )
    return str(folder)
