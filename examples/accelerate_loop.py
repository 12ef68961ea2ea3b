"""A training loop with accelerate, in one process or several.

Run `python examples/accelerate_loop.py`, or
`accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py`.
"""

import accelerate
import small
import torch
from torch.utils.data import DataLoader

import tokenseek_fx


def main(steps: int = 6, **options: object) -> list[float]:
    """Train, and return the losses of this process."""
    torch._dynamo.config.optimize_ddp = False  # it would split the model at DDP's gradient buckets
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    model, loader = small.llama(), DataLoader(small.encoded(), batch_size=4)
    model.compile(backend="tokenseek", options={"keep_ratio": 0.2, **options})  # before DDP wraps it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(steps), loader, strict=False):
        with accelerator.accumulate(model), tokenseek_fx.record() as rec:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"loss {loss.item():.3f}, kept {rec[0].indices.shape[1]} of {rec[0].scores.shape[1]}")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
