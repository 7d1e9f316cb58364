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
        trainer = self.trainer
        trainer.expect(targets)
        if trainer.schedule is None:
            (part,) = trainer.parts.values()
            pairs = trainer.micro_batches(tokens, targets)
            losses = [loss.plain(trainer.scaled_loss(part(own), wanted)) for own, wanted in pairs]
        else:
            losses = trainer.through(trainer.schedule.eval, tokens, targets)
        return float(trainer.mean_loss(losses)) / trainer.scale.value
