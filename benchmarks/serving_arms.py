"""One arm of benchmarks/serving.py as a process of its own: it is told a number of rows, and answers with CPU seconds.

    PYTHON serving_arms.py ARM FOLDER      FOLDER holds work.json, which serving.py writes

The arms of vLLM run under the Python of vLLM's environment, which needs nothing of ours but the connector.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose CPU seconds are counted
    "VLLM_LOGGING_LEVEL": "ERROR",
}

Run = Callable[[int], list[list[int]]]  # the new tokens of so many rows


def engine(work: dict[str, Any], *, mixed: bool) -> Run:
    """The server's engine: the base alone, or soft prompts in turn and none."""
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.inference.settings import DecodeSettings
    from softprompt.serving.engine import Finished, Work
    from softprompt.serving.local_engine import LocalEngine
    from softprompt.store.artifact import load_prompt

    lm = FrozenLM.load(work["base"], dtype=work["dtype"], device="cpu")
    settings = DecodeSettings(max_new_tokens=work["new_tokens"], ignore_end=True)
    local = LocalEngine(lm, max_rows=max(work["rows"]))
    for digest, folder in work["prompts"].items():
        local.load(load_prompt(folder), digest)
    local.start()

    async def answer(row: dict[str, Any]) -> list[int]:
        async for event in local.submit(Work(row["digest"] if mixed else None, row["text"], settings)):
            if isinstance(event, Finished):
                return list(event.token_ids)
        raise AssertionError("an answer without an end")

    async def every(rows: int) -> list[list[int]]:
        return list(await asyncio.gather(*(answer(row) for row in work["requests"][:rows])))

    return lambda rows: asyncio.run(every(rows))


def static(work: dict[str, Any], *, frozen: bool = False) -> Run:
    """transformers' generate over one batch, padded on the left.

    Of a `frozen` model (requires_grad off, as in any prompt tuning) torch 2.13 copies the head's weights once a row where it
    multiplies the last states of the texts with them: a view of [B, 1, D], which it folds into one product only where the
    weights want a gradient."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work["base"], dtype=getattr(torch, work["dtype"]))
    model.requires_grad_(not frozen)
    tokenizer = AutoTokenizer.from_pretrained(work["base"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    new = work["new_tokens"]

    def run(rows: int) -> list[list[int]]:
        texts = [row["text"] for row in work["requests"][:rows]]
        padded = tokenizer(texts, return_tensors="pt", padding=True)
        given = {name: padded[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        answers: list[list[int]] = ids[:, padded["input_ids"].shape[1] :].tolist()
        return answers

    return run


def continuous(work: dict[str, Any]) -> Run:
    """transformers' own continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        work["base"], dtype=getattr(torch, work["dtype"]), attn_implementation="sdpa"
    )
    new = work["new_tokens"]
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Room for all rows at once, kept between the rounds: by default it fills most of the memory each time.
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=8 * max(work["rows"]), max_batch_tokens=2048, allow_block_sharing=False
    )

    def run(rows: int) -> list[list[int]]:
        ids = [row["text_ids"] for row in work["requests"][:rows]]
        answers = model.generate_batch(
            ids,
            generation_config=config,
            continuous_batching_config=batching,
            warmup=False,
            persistent_manager=True,
        )
        ordered = sorted(answers.values(), key=lambda answer: int(answer.request_id.rsplit("_", 1)[-1]))
        return [list(answer.generated_tokens) for answer in ordered]

    return run


def vllm(work: dict[str, Any], way: str) -> Run:
    """Stock vLLM without a prefix cache: the base alone, our connector, or prompt embeddings."""
    from vllm import LLM, SamplingParams

    connector = {
        "kv_connector": "SoftPromptConnector",
        "kv_connector_module_path": "softprompt.scale.vllm_connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"states": work["states"]},
    }
    llm = LLM(
        work["base"],
        dtype=work["dtype"],
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=max(work["rows"]),
        enable_prefix_caching=False,  # else a second round would read no text
        enable_prompt_embeds=way == "embeddings",
        **({"kv_transfer_config": connector} if way == "connector" else {}),
    )
    embedded: dict[str, Any] = {}
    if way == "embeddings":
        from safetensors.torch import load_file

        embedded = load_file(work["embeddings"])

    def run(rows: int) -> list[list[int]]:
        prompts: list[Any] = []
        params: list[Any] = []
        for number, row in enumerate(work["requests"][:rows]):
            digest, extra = row["digest"], {}
            if way == "alone" or digest is None:
                prompts.append({"prompt_token_ids": row["text_ids"]})
            elif way == "embeddings":
                prompts.append({"prompt_embeds": embedded[str(number)]})
            else:
                prompts.append({"prompt_token_ids": row["placeholder_ids"], "cache_salt": digest})
                transfer = {"softprompt": digest, "softprompt_positions": row["positions"]}
                extra = {"extra_args": {"kv_transfer_params": transfer}}
            params.append(
                SamplingParams(temperature=0, max_tokens=work["new_tokens"], ignore_eos=True, **extra)
            )
        answers = llm.generate(prompts, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return run


ARMS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "transformers, static batch": static,
    "transformers, static batch, frozen": lambda work: static(work, frozen=True),
    "transformers, continuous batching": continuous,
    "engine, base alone": lambda work: engine(work, mixed=False),
    "engine, 8 prompts in turn and none": lambda work: engine(work, mixed=True),
    "vllm, base alone": lambda work: vllm(work, "alone"),
    "vllm, 8 prompts in turn and none, our connector": lambda work: vllm(work, "connector"),
    "vllm, 8 prompts in turn and none, prompt embeddings": lambda work: vllm(work, "embeddings"),
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    work = json.loads((Path(sys.argv[2]) / "work.json").read_text())
    run = ARMS[sys.argv[1]](work)
    print("READY", flush=True)
    for line in sys.stdin:
        began = time.process_time()
        answers = run(int(line))
        seconds = time.process_time() - began
        assert [len(answer) for answer in answers] == [work["new_tokens"]] * int(line), answers
        print("RESULT " + json.dumps({"cpu_seconds": seconds, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
