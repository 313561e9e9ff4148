"""A soft prompt learned by transformers' Trainer, then saved as a prompt of ours. Runs offline in a few seconds.

    python examples/in_a_trainer.py

For those whose training already lives in Trainer, with its callbacks and trackers. Needs `accelerate`, as Trainer does.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from softprompt import FrozenLM, SoftPrompt, load_splits, save_prompt
from softprompt.prompt.init import sampled_vocabulary

LENGTH = 10
lm = FrozenLM.load("builtin", dtype="float32")


class WithSoftPrompt(nn.Module):
    """The frozen model with learned vectors in front of every row."""

    def __init__(self) -> None:
        super().__init__()
        start_PD = sampled_vocabulary(lm.embedding_VD, LENGTH, torch.Generator().manual_seed(0))
        self.vectors_PD = nn.Parameter(start_PD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        rows = len(input_ids)
        vectors_BPD = self.vectors_PD.expand(rows, -1, -1)
        found = lm.model(
            inputs_embeds=torch.cat([vectors_BPD, lm.model.get_input_embeddings()(input_ids)], 1),
            attention_mask=torch.cat([attention_mask.new_ones(rows, LENGTH), attention_mask], 1),
            labels=torch.cat([labels.new_full((rows, LENGTH), -100), labels], 1),
        )
        return {"loss": found.loss}


def row(text: str, label: str) -> dict[str, list[int]]:
    """Token ids of one message; -100 where nothing is learned, as Trainer's users know it."""
    read = lm.tokenizer(f"Message: {text} Kind:")["input_ids"]
    learned = [*lm.tokenizer(f" {label}", add_special_tokens=False)["input_ids"], lm.tokenizer.eos_token_id]
    return {"input_ids": read + learned, "labels": [-100] * len(read) + learned}


rows = [
    row(each.fields["text"], each.fields["label"]) for each in load_splits("builtin:messages", limit=64).train
]
model = WithSoftPrompt()
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
        "runs/trainer",
        per_device_train_batch_size=8,
        max_steps=24,
        learning_rate=0.05,
        weight_decay=0.0,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    ),
    train_dataset=rows,
    data_collator=transformers.DataCollatorForSeq2Seq(lm.tokenizer, padding=True),
)
trainer.train()

template = f"{{soft:{LENGTH}}}Message: {{text}} Kind: {{label}}"
prompt = SoftPrompt(model.vectors_PD.detach(), lm.fingerprint, template, "label", name="trainer")
print("saved in", save_prompt(prompt, "runs/trainer-prompt"))
