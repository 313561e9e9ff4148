"""The training loop by hand: a plain torch optimiser, no recipe. Runs offline in a few seconds.

    python examples/tune_by_hand.py

`softprompt tune` adds to this loop: a measured learning rate, held-out loss, the best step, checkpoints, a log.
"""

from __future__ import annotations

import torch

from softprompt import FrozenLM, SoftPrompt, Template, generate, load_splits, save_prompt
from softprompt.data.batch import collate, encode_all
from softprompt.data.layout import Layout
from softprompt.prompt.init import sampled_vocabulary

lm = FrozenLM.load("builtin")
rows = load_splits("builtin:messages", target="label", limit=64).train
template = Template.parse("Message: {text} Kind:{soft:10} {label}", target="label", length=10)
encoded = encode_all(
    Layout.of(template, lm.tokenizer), rows
).encoded  # token ids, the slot, and what the loss counts

vectors = torch.nn.Parameter(sampled_vocabulary(lm.embedding_VD, 10, torch.Generator().manual_seed(0)))
optimiser = torch.optim.AdamW([vectors], lr=0.05, weight_decay=0.0)
losses = []
for step in range(24):
    batch = collate([encoded[(8 * step + row) % len(encoded)] for row in range(8)])
    loss = lm.token_nll(
        batch, (vectors,)
    ).mean()  # nats per trained token; the gradient reaches the vectors alone
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(loss.item())
    print(f"step {step + 1}  loss {loss.item():.3f}")

prompt = SoftPrompt(vectors.detach(), lm.fingerprint, str(template), "label", name="by-hand")
save_prompt(prompt, "runs/by-hand")
print(generate(lm, "Where is my parcel?", prompt)[0].text)
