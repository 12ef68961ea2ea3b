"""Lightning: compile the model in place inside the module: `python examples/lightning_module.py`."""

import tempfile

import lightning
import small
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import tokenseek_fx


class FineTuning(lightning.LightningModule):
    """Trains on selected tokens; validation and checkpoints are unaffected."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.model = small.llama()
        self.model.compile(backend="tokenseek", options={"keep_ratio": 0.2, **options})

    def training_step(self, batch: dict, number: int) -> torch.Tensor:
        """Return the loss, and log it with the kept fraction of the tokens."""
        with tokenseek_fx.record() as rec:
            loss = self.model(**batch).loss
        self.log_dict({"loss": loss.detach(), "kept": rec[0].indices.numel() / rec[0].scores.numel()})
        return loss

    def validation_step(self, batch: dict, number: int) -> None:
        """Log the loss of all tokens: evaluation selects none."""
        self.log("held_out", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 6, **options: object) -> dict:
    """Train with a held-out batch, and keep the best checkpoint.

    Returns the last logged figures, and the held-out loss of the checkpoint's weights.
    """
    texts = small.encoded()
    train, held_out = DataLoader(texts[4:], batch_size=4), DataLoader(texts[:4], batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="held_out")
        trainer = lightning.Trainer(
            max_steps=steps,
            val_check_interval=2,
            accelerator="cpu",
            logger=False,
            callbacks=[best],
            enable_model_summary=False,
        )
        trainer.fit(FineTuning(**options), train, held_out)
        weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    plain = small.llama().eval()  # the checkpoint loads into a model that is not compiled
    plain.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    with torch.no_grad():
        loss = plain(**next(iter(held_out))).loss
    return {name: float(value) for name, value in [*trainer.logged_metrics.items(), ("of_checkpoint", loss)]}


if __name__ == "__main__":
    print(main())
