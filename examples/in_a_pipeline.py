"""A soft prompt in a transformers pipeline, through a copy of the base that has the vectors as added tokens.

    softprompt tune --data builtin:messages --limit 32 --epochs 1 --out runs/sort \
        --target label --template '{soft:10}Message: {text} Kind: {label}'
    python examples/in_a_pipeline.py runs/sort runs/merged

The folder `runs/merged` needs no softprompt: any program that loads transformers models can use it. The command
`softprompt export runs/sort --to merged --out runs/merged` writes the same.
"""

from __future__ import annotations

import sys

import transformers

from softprompt import FrozenLM, generate, load_prompt
from softprompt.export.merged import merge_prompt

prompt = load_prompt(sys.argv[1])
lm = FrozenLM.load(prompt.base.name)
merge_prompt(lm, prompt, sys.argv[2])

# The tokenizer of the copy puts the soft prompt before every text, so the text alone is passed.
pipeline = transformers.pipeline("text-generation", model=sys.argv[2], device=-1)
text = "Message: Where is my parcel? Kind:"
answer = pipeline(text, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
print("pipeline  ", answer.strip())

same = generate(lm, "Where is my parcel?", prompt)[0].text
print("softprompt", same.strip())
