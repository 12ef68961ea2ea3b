"""TRL's SFTTrainer with adapters of PEFT, and loss on completions only: `python examples/sft.py`."""

import tempfile

import peft
import small
import torch
from trl import SFTConfig, SFTTrainer

from tokenseek_fx.integrations import TokenSeekCallback


def main(steps: int = 6, **options: object) -> list[dict]:
    """Train, and return the trainer's logs."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            small.llama(),
            SFTConfig(
                directory,
                max_steps=steps,
                per_device_train_batch_size=4,
                logging_steps=2,
                pad_to_multiple_of=small.LENGTH,  # one length, one graph
                report_to=[],
                use_cpu=not torch.cuda.is_available(),  # TRL trains in bfloat16
            ),
            train_dataset=small.prompts(),
            processing_class=small.tokenizer(),
            peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            callbacks=[TokenSeekCallback(**{"keep_ratio": 0.2, **options})],
        )
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
