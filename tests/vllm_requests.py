"""Run by the Python of vLLM's environment: puts requests of a JSON file to vLLM with our connector, prints what came.

PYTHON vllm_requests.py FOLDER     FOLDER holds base/, states/, late/ (files that are added while it runs), requests.json
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
NEW_TOKENS = 24


def main() -> None:
    from vllm import LLM, SamplingParams

    folder = Path(sys.argv[1])
    requests: list[dict[str, Any]] = json.loads((folder / "requests.json").read_text())
    random.Random(0).shuffle(requests)
    llm = LLM(
        str(folder / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=192,
        block_size=32,
        num_gpu_blocks_override=16,  # so few that rows are preempted
        max_num_seqs=64,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "SoftPromptConnector",
            "kv_connector_module_path": "softprompt.scale.vllm_connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"states": str(folder / "states")},
        },
    )

    def put(asked: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        prompts, params = [], []
        for each in asked:
            digest = each["digest"]
            prompts.append({"prompt_token_ids": each["ids"], **({"cache_salt": digest} if digest else {})})
            transfer = {"softprompt": digest, "softprompt_positions": each.get("positions")}
            extra = {"extra_args": {"kv_transfer_params": transfer}} if digest else {}
            params.append(
                SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, **extra, **more)
            )
        answers = llm.generate(prompts, params, use_tqdm=False)
        return [
            {
                "number": each["number"],
                "token_ids": list(answer.outputs[0].token_ids),
                "finish_reason": answer.outputs[0].finish_reason,
            }
            for each, answer in zip(asked, answers, strict=True)
        ]

    late = {path.name.partition(".")[0]: path for path in (folder / "late").iterdir()}
    known = [each for each in requests if each["digest"] not in late]
    unknown = [each for each in requests if each["digest"] in late]
    found: dict[str, Any] = {"early": put(known), "unknown": put(unknown[:1] + known[:3])}
    for path in late.values():
        shutil.copy(path, folder / "states" / path.name)
    found["all"] = put(requests)
    found["preemptions"] = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    found["rated"] = put([each for each in requests if each["digest"]][:4], prompt_logprobs=1)
    found["after"] = put(requests)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
