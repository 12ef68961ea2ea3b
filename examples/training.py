"""Training for the demo and the benchmarks: gradient checkpointing, a step, evaluation."""

import data
import torch
from torch import nn


def checkpoint(model: nn.Module) -> None:
    """Switch gradient checkpointing of a transformers model on: all layers are recomputed in backward."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name from transformers 5.20 on
    (enable or model.gradient_checkpointing_enable)()


def step(model: nn.Module, batch: data.Batch, optimizer: torch.optim.Optimizer) -> float:
    """Forward, backward and update; returns the loss. Gradients stay allocated."""
    optimizer.zero_grad(set_to_none=False)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def held_out_loss(model: nn.Module, pairs: data.Batch, batch: int) -> float:
    """Mean loss over all labelled tokens, uncompiled (`model.compile` doesn't replace `model.forward`)."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(pairs["labels"]), batch):
        part = {name: value[start : start + batch] for name, value in pairs.items()}
        labelled = (part["labels"][:, 1:] != data.IGNORED).sum().item()
        total, count = total + model.forward(**part).loss.item() * labelled, count + labelled
    model.train()
    return total / count
