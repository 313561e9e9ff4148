"""Seconds an epoch, memory and loss of the tutorial's recipe: PEFT with Trainer against softprompt.

    python benchmarks/tuning_vs_peft.py                                # bloomz-560m's shape, one epoch, three rounds
    python benchmarks/tuning_vs_peft.py --rows 16 --rounds 1           # a quick look
    python benchmarks/tuning_vs_peft.py --base builtin --curves        # a trained base, loss curves side by side
    python benchmarks/tuning_vs_peft.py --base llama-1b --device cuda  # on a GPU; also --batch-size 64
    OMP_NUM_THREADS=1 python benchmarks/tuning_vs_peft.py --base smollm2 --words 45 --length 20 --task label
    ... --task label --arms peft-fp32,softprompt-fp32,softprompt-answer-fp32   # the slot right before the answer too

Every arm runs in a process of its own and takes turns with the others. The rates of plain matrix products are measured
in the same process just before, so that the share of the floor (FLOPs needed over the best rate) means that run.
Seconds of the CPU are given beside those of the clock: where other work runs on the machine, and OMP_NUM_THREADS is 1,
they tell more. Random weights are fine for speed; what a run ends at is compared on trained bases, from the same start
and with the same batches in the same order.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for every arm: spinning threads starve each other
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from machine import demand_device, matrix_rates, peak_bytes, rounds, write_result

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloomz-560m": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880}),
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
    "smollm2-shape": (
        "llama",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 50_304,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50_304}),
}
START = "Write what an assistant should act as. "
ARMS = ("peft-fp32", "peft-bf16", "softprompt", "softprompt-int8")
REAL_ARMS = (
    "peft-fp32",
    "softprompt-fp32",
    "peft-bf16",
    "softprompt-bf16",
)  # of a trained base, dtype by dtype
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LABELS = ("guide", "tool")


def dtype_of(arm: str) -> str:
    """The dtype in an arm's name; `auto` where it names none."""
    return DTYPES.get(arm.rpartition("-")[2], "auto")


def cut_texts(options: argparse.Namespace) -> list[str]:
    """The rows, each cut to `--words` words."""
    rows = texts(options.rows)
    return [" ".join(row.split()[: options.words]) for row in rows] if options.words else rows


def texts(rows: int, seed: int = 0) -> list[str]:
    """The tutorial's rows, or text of like lengths where the data set is not at hand."""
    file = SHARED / "awesome-chatgpt-prompts" / "prompts_153rows_2023-03-07.csv"
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            return [row["prompt"] for row in csv.DictReader(lines)][:rows]
    import random

    drawn = random.Random(seed)
    words = "I want you to act as a guide and to reply with one short answer only".split()
    return [" ".join(drawn.choices(words, k=drawn.randint(45, 160))) for _ in range(rows)]


def base_folder(base: str, work: Path) -> str:
    """A folder to load from: a trained base's own, or random weights of a shape, written once."""
    if base == "smollm2":
        return str(HERE.parent / "bases" / "smollm2")  # where `make base` puts it
    if base not in SHAPES:
        return base
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = work / base
    if not (folder / "tokenizer_config.json").exists():
        kind, settings = SHAPES[base]
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **settings, pad_token_id=3, eos_token_id=2, bos_token_id=1)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
        tokenizer.eos_token = tokenizer.eos_token or "<|endoftext|>"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_folder() -> str:
    found = SHARED / "tokenizers" / "gpt2"
    return str(found if found.exists() else HERE.parent / "src" / "softprompt" / "base" / "builtin")


def recipe_for(options: argparse.Namespace, folder: str, out: str) -> Any:
    from softprompt.tuning.recipe import Recipe

    text_start = {"init": "text", "init_text": START}
    return Recipe(
        base=folder,
        device=options.device,
        dtype=dtype_of(options.arm),
        out=out,
        data={"source": "memory", "validation": 0}
        | (
            {"target": "label", "template": "{text} Kind: {label}"}
            if options.task == "label"
            else {"column": "text"}
        ),
        prompt={"length": options.length, "place": "answer" if "answer" in options.arm else "front"}
        | (text_start if options.curves else {"init": "random"}),
        tune={
            "learning_rate": options.rate,
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "optimizer": "adamw",
            "warmup": 0.0,
            **({"int8_products": True} if options.arm == "softprompt-int8" else {}),
        },
    )


def run_softprompt(options: argparse.Namespace, folder: str, lm: Any = None) -> dict[str, Any]:
    from softprompt.data.example import Example, Splits
    from softprompt.progress.events import Event, Started, Stepped, Validated
    from softprompt.tuning.loop import tune

    rows = tuple(
        Example({"text": text, "label": LABELS[i % 2]}, row=i) for i, text in enumerate(cut_texts(options))
    )
    losses: list[float] = []
    clock, cpu = [0.0, 0.0], [0.0, 0.0]
    # With the slot at the answer, measuring the start reads the text before it, once for the whole run: that counts.
    first = Started if "answer" in options.arm else Validated

    def told(event: Event) -> None:
        if isinstance(event, Stepped):
            losses.append(event.nll)
            clock[1], cpu[1] = time.perf_counter(), time.process_time()
        if isinstance(event, first) and not losses:
            clock[0], cpu[0] = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        tuned = tune(
            recipe_for(options, folder, out),
            lm=lm,
            splits=Splits(rows, (), (), "memory", None),
            on_event=told,
        )
        seconds = time.perf_counter() - began
    tokens = tuned.tokens
    return {
        "epoch_seconds": (clock[1] - clock[0]) / options.epochs,
        "epoch_cpu_seconds": (cpu[1] - cpu[0]) / options.epochs,
        "tokens": tokens // options.epochs,
        "losses": losses,
        "whole_run_seconds": seconds,
        "prompt": tuned.prompt.embeddings_PD.tolist() if options.curves else None,
    }


def run_peft(options: argparse.Namespace, folder: str, dtype: str) -> dict[str, Any]:
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    start = (
        {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": START,
            "tokenizer_name_or_path": folder,
        }
        if options.curves
        else {"prompt_tuning_init": PromptTuningInit.RANDOM}
    )
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=options.length,
        tokenizer_name_or_path=folder,
        **{k: v for k, v in start.items() if k != "tokenizer_name_or_path"},
    )
    model = get_peft_model(model, config)
    if options.task == "label":
        encoded = []
        for i, text in enumerate(cut_texts(options)):
            before, label = (
                tokenizer(f"{text} Kind:")["input_ids"],
                tokenizer(f" {LABELS[i % 2]}")["input_ids"],
            )
            label = [*label, tokenizer.eos_token_id]
            ids = [*before, *label]
            encoded.append(
                {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(before) + label}
            )
    else:
        encoded = [dict(tokenizer(text)) for text in cut_texts(options)]
    tokens = sum(len(one["input_ids"]) for one in encoded)
    epochs = options.epochs
    if options.curves:  # the very batches of softprompt, one after the other
        from softprompt.data.batch import epoch_order

        lengths = [len(one["input_ids"]) + options.length for one in encoded]
        encoded = [
            encoded[i]
            for epoch in range(epochs)
            for batch in epoch_order(lengths, options.batch_size, seed=0, epoch=epoch)
            for i in batch
        ]
        epochs = 1

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *given: Any, **named: Any) -> Any:
            if options.curves:
                return SequentialSampler(encoded)
            return super()._get_train_sampler(*given, **named)

    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as out:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                output_dir=out,
                use_cpu=options.device == "cpu",
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.rate,
                num_train_epochs=epochs,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
                bf16=dtype == "bfloat16" and options.device != "cpu",
                seed=0,
            ),
            train_dataset=encoded,
            data_collator=(
                DataCollatorForSeq2Seq(tokenizer)
                if options.task == "label"
                else DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
            ),
            callbacks=[Watch()],
        )
        began, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    weights = model.get_prompt_embedding_to_save("default").float()
    return {
        "epoch_seconds": seconds / options.epochs,
        "epoch_cpu_seconds": cpu / options.epochs,
        "tokens": tokens,
        "losses": losses,
        "whole_run_seconds": seconds,
        "prompt": weights.tolist() if options.curves else None,
    }


def final_loss(options: argparse.Namespace, folder: str, prompt: Sequence[Sequence[float]]) -> float:
    """Nats per token of all rows in float32 by transformers, whatever the prompt was learned with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_PD = torch.tensor(prompt, device=options.device)
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts(options.rows):
            ids_T = torch.tensor(tokenizer(text)["input_ids"], device=options.device)
            embedded_SD = torch.cat([prompt_PD, model.get_input_embeddings()(ids_T)])
            logits_TV = model(inputs_embeds=embedded_SD[None]).logits[0, len(prompt_PD) - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(logits_TV, ids_T, reduction="sum").item()
            count += len(ids_T)
    return total / count


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    folder = base_folder(options.base, Path(options.work))
    if folder == "builtin":
        folder = str(HERE.parent / "src" / "softprompt" / "base" / "builtin")
    if options.arm == "prepare":
        return {"folder": folder}
    rates = matrix_rates(options.device)
    arm = options.arm
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # of the products above
    found = (
        run_softprompt(options, folder)
        if arm.startswith("softprompt")
        else run_peft(options, folder, dtype_of(arm))
    )
    found["peak_bytes"] = peak_bytes(options.device)
    found["gflops"] = rates
    config = json.loads((Path(folder) / "config.json").read_text())
    del torch
    positions = found["tokens"] + options.length * options.rows
    # Of a label task only two tokens a row (the label and the end) pass the head; a dtype is held to its own rate.
    scored = 2 * options.rows if options.task == "label" else positions
    wanted = dtype_of(arm)
    rate = rates.get(wanted) or max(rate for name, rate in rates.items() if name != "int8")
    found["floor_seconds"] = floor_flops(folder, positions, scored) / (rate * 1e9)
    found["share_of_floor"] = found["floor_seconds"] / found["epoch_seconds"]
    found["share_of_floor_cpu"] = found["floor_seconds"] / found["epoch_cpu_seconds"]
    found["architecture"] = config["architectures"][0]
    if found["prompt"]:
        found["final_loss"] = final_loss(options, folder, found.pop("prompt"))
    return found


def floor_flops(folder: str, positions: int, scored: int) -> float:
    """4 a weight and position: the forward pass and the gradient towards the input; embedding look-ups are free.

    The head counts for the scored positions alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    for matrix in (head, table):
        weights.pop(id(matrix), None)
    return 4.0 * (sum(weights.values()) * positions + head.numel() * scored)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="bloomz-560m", help=f"{', '.join(SHAPES)}, builtin or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="", help=f"default {','.join(ARMS)}; smollm2 {','.join(REAL_ARMS)}")
    parser.add_argument(
        "--task", choices=["text", "label"], default="text", help="learn all text, or a label"
    )
    parser.add_argument("--words", type=int, default=0, help="cut every row to so many words; 0 keeps all")
    parser.add_argument("--curves", action="store_true", help="same start and batches; compare final losses")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "softprompt-benchmarks"))
    parser.add_argument("--note", default="", help="what else ran on the machine; kept in the result")
    parser.add_argument("--name", default="", help="name of the result file")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    demand_device(parser, options.device)
    if options.arm:
        print("RESULT " + json.dumps(run_arm(options)))
        return
    Path(options.work).mkdir(parents=True, exist_ok=True)
    given = list(sys.argv[1:])
    rounds(__file__, given, ["prepare"], 1)
    real = Path(options.base).name == "smollm2"
    arms = options.arms or ",".join(REAL_ARMS if real else ARMS)
    found = rounds(__file__, given, arms.split(","), options.rounds)
    name = options.name or f"tuning_vs_peft_{Path(options.base).name}_{options.device}"
    measure = "epoch_cpu_seconds" if real else "epoch_seconds"
    write_result(HERE / f"{name}.json", vars(options), found, against="peft-fp32", measure=measure)


if __name__ == "__main__":
    main()
