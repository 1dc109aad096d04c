"""Blocks on a Ray cluster through Ray Data. Imported only when it is asked for; all nodes share the folder's disk."""

from __future__ import annotations

from typing import Any

from mmpost.contribution.run import Asker, Work
from mmpost.core.errors import MmpostError

try:
    import ray
    import ray.data
except ModuleNotFoundError as missing:
    raise MmpostError(
        "MMP-E010", "engine 'ray' needs ray, which is not installed.", 'Run: pip install "mmpost-toolkit[ray]"'
    ) from missing


class _Actor:
    """One process of the cluster: opens a model once and finishes the blocks that it is sent."""

    def __init__(self, work: Work) -> None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(work.threads)
        self.asker = Asker(work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for voter, block in zip(batch["voter"], batch["block"], strict=True):
            self.asker(int(voter), int(block), alive=lambda: True)
        return batch


def run_on_ray(work: Work, actors: int, *, gpus: float) -> None:
    """Finish all blocks.

    Args:
        work: The work; it is put into the object store once.
        actors: Actors at once.
        gpus: GPUs of each.

    Raises:
        MmpostError: What the first failing block raised.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    left = [{"voter": voter, "block": block} for voter, block in work.blocks if not work.is_done(voter, block)]
    if not left:
        return
    found = ray.data.from_items(left, override_num_blocks=len(left)).map_batches(
        _Actor,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(left))),
        num_cpus=1,
        num_gpus=gpus,
    )
    try:
        found.materialize()
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MmpostError):
            cause = cause.__cause__ or getattr(cause, "cause", None)
        if isinstance(cause, MmpostError):
            raise cause from error
        raise
