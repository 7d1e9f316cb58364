"""The loss on data that is not trained on: the same sequences each time, forward only."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule

from planner.runtime import loss
from planner.runtime.data import Batches
from planner.runtime.train import Trainer


class Evaluation:
    """The evaluation set of a run: the first `eval_batches` global batches of `eval_data`."""

    def __init__(self, trainer: Trainer):
        options = trainer.options
        self.trainer = trainer
        self.batches = Batches(trainer.plan, trainer.world, options.seed, options.eval_data)
        self.count = options.eval_batches

    def loss(self) -> float:
        """Mean loss over the set, on every rank. Collective; weights stay as they are."""
        with torch.no_grad(), loss.split_vocabulary(self.trainer.layout.tp):
            total = sum(self._batch(i) for i in range(self.count))
        for part in self.trainer.parts.values():
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # without a backward FSDP2 would keep what it gathered
        return total / self.count

    def _batch(self, step: int) -> float:
        tokens, targets = self.batches.get(step)
        trainer, losses = self.trainer, []
        if trainer.schedule is None:
            (part,) = trainer.parts.values()
            size = trainer.layout.micro_batch
            for i in range(trainer.microbatches):
                rows = slice(i * size, (i + 1) * size)
                losses.append(loss.plain(loss.token_loss(part(tokens[rows]), targets[rows])))
            return trainer.mean_loss(losses)
        trainer.schedule.eval(
            *((tokens,) if trainer.world.is_first_stage else ()),
            target=targets if trainer.world.is_last_stage else None,
            losses=losses,
            return_outputs=False,
        )
        return trainer.mean_loss([loss.plain(value) for value in losses]) / trainer.scale.value
