"""A plain PyTorch loop with adapters of PEFT: `python examples/loop.py`."""

import peft
import small
import torch
from torch.utils.data import DataLoader

import tokenseek_fx


def main(steps: int = 6, **options: object) -> list[float]:
    """Train, and return the losses."""
    model = peft.get_peft_model(small.llama(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.compile(backend="tokenseek", options={"keep_ratio": 0.2, **options})
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _, batch in zip(range(steps), DataLoader(small.encoded(), batch_size=4), strict=False):
        with tokenseek_fx.record() as rec:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {loss.item():.3f}, kept {rec[0].indices.shape[1]} of {rec[0].scores.shape[1]}")
    return losses


if __name__ == "__main__":
    main()
