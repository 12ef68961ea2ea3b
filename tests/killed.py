"""A training run in a process of its own: ``python tests/killed.py DIRECTORY KILLED_AT`` (0: not killed).

It resumes from the last checkpoint in the directory, if there is one, and prints the losses and the steps that it
trained itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import zoo
from test_trainer import losses, trainer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tokenseek_fx.integrations import TokenSeekCallback


class Kill(TrainerCallback):
    """SIGKILL between backward and the optimizer's step; counts the steps before."""

    def __init__(self, step: int) -> None:
        self.step, self.trained = step, []

    def on_pre_optimizer_step(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self.trained.append(state.global_step + 1)
        if self.trained[-1] == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(where: str, step: str) -> None:
    checkpoint = get_last_checkpoint(where) if Path(where).exists() else None
    seed = int(checkpoint is not None)  # other weights, which those of the checkpoint replace
    model = zoo.build("llama", dtype=torch.float32, layers=1, seed=seed)
    kill, ours = Kill(int(step)), TokenSeekCallback(keep_ratio=0.5, inner="eager")
    run = trainer(Path(where), ours, kill, model=model, save_steps=1, eval_strategy="no", seed=7)
    run.train(resume_from_checkpoint=checkpoint)
    print(json.dumps({"losses": losses(run), "trained": kill.trained}))


if __name__ == "__main__":
    main(*sys.argv[1:])
