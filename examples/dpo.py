"""TRL's DPOTrainer, which computes its loss outside the model: `python examples/dpo.py`."""

import tempfile

import peft
import small
import torch
from trl import DPOConfig, DPOTrainer

from tokenseek_fx.integrations import TokenSeekCallback

#: The loss uses only log-probabilities of answers, so their tokens are kept first.
ANSWERS = {"keep_ratio": 0.5, "scorer": "random", "labelled_first": 1.0}


def main(steps: int = 6, **options: object) -> list[dict]:
    """Train, and return the trainer's logs."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = DPOTrainer(
            small.llama(),
            args=DPOConfig(
                directory,
                max_steps=steps,
                per_device_train_batch_size=4,
                logging_steps=2,
                pad_to_multiple_of=small.LENGTH,  # one length, one graph
                report_to=[],
                use_cpu=not torch.cuda.is_available(),  # TRL trains in bfloat16
            ),
            train_dataset=small.preferences(),
            processing_class=small.tokenizer(),
            peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            callbacks=[TokenSeekCallback(**{**ANSWERS, **options})],
        )
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
