"""Lightning: compile the model inside the module, in place: `python examples/lightning_module.py`."""

import lightning
import small
import torch
from torch.utils.data import DataLoader

import tokenseek_fx


class FineTuning(lightning.LightningModule):
    """Trains on selected tokens; validation and checkpoints know nothing of it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.model = small.llama()
        self.model.compile(backend="tokenseek", options={"keep_ratio": 0.2, **options})

    def training_step(self, batch: dict, number: int) -> torch.Tensor:
        """The loss; the share that was kept goes to the logger."""
        with tokenseek_fx.record() as rec:
            loss = self.model(**batch).loss
        self.log_dict({"loss": loss.detach(), "kept": rec[0].indices.numel() / rec[0].scores.numel()})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 6, **options: object) -> dict:
    """Train and return the last logged figures."""
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(FineTuning(**options), DataLoader(small.encoded(), batch_size=4))
    return {name: float(value) for name, value in trainer.logged_metrics.items()}


if __name__ == "__main__":
    print(main())
