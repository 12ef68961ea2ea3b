"""transformers' Trainer with a callback that trains on selected tokens: `python examples/trainer.py`."""

import tempfile

import small
from transformers import Trainer, TrainingArguments

from tokenseek_fx.integrations import TokenSeekCallback


def main(steps: int = 6, **options: object) -> list[dict]:
    """Train, and return the Trainer's logs."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            small.llama(),
            TrainingArguments(directory, max_steps=steps, per_device_train_batch_size=4, logging_steps=2, report_to=[]),
            train_dataset=small.encoded(),
            callbacks=[TokenSeekCallback(**{"keep_ratio": 0.2, **options})],
        )
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
