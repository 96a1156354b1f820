"""Step -> factor on the optimizer's learning rate: pure."""

from imgcls.recipe import Constant, OneCycle


def lr_factor(schedule: Constant | OneCycle, step: int, *, total_steps: int) -> float:
    """The factor at which step `step` of 0 .. total_steps - 1 is taken."""
    if isinstance(schedule, Constant):
        return 1.0
    warmup = max(1, round(schedule.warmup * total_steps))
    rising = (step + 1) / warmup
    falling = (total_steps - step) / max(1, total_steps - warmup + 1)
    return max(0.0, min(rising, falling, 1.0))
