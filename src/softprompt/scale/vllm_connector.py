"""A KV connector for stock vLLM: requests begin with the keys and values of a compiled prompt. vLLM itself is not changed.

    vllm serve BASE --kv-transfer-config '{"kv_connector": "SoftPromptConnector",
        "kv_connector_module_path": "softprompt.scale.vllm_connector", "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"states": "FOLDER"}}'

FOLDER holds what `softprompt export PROMPT --to vllm-kv` writes; a file that is added is served at once. A request for a prompt
sends placeholder ids and the text's ids as its prompt, the digest as `cache_salt`, and {"softprompt": digest,
"softprompt_positions": P} as `kv_transfer_params`: `softprompt serve --engine vllm=URL` does that. A request that cannot be
served ends with an error, and no other request notices.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from softprompt.scale.kv_loading import MAX_BYTES, PARAMETER, Load, LoadedStates, Scheduling

log = logging.getLogger(__name__)


@dataclass
class SoftPromptMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The files that the workers load before the coming step."""

    loads: list[Load] = field(default_factory=list)


class SoftPromptConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Puts keys and values of compiled prompts into vLLM's cache."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.get_from_extra_config
        folder = extra("states", None)
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"kv_connector_extra_config.states: found {folder!r}, wanted the folder of `softprompt export --to vllm-kv`."
            )
        demand_plain_attention(vllm_config, kv_cache_config)
        model = vllm_config.model_config
        text = model.hf_text_config
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("softprompt: pipeline parallelism is not supported. Use tensor parallelism.")
        if role == KVConnectorRole.SCHEDULER:
            heads, width = model.get_total_num_kv_heads(), model.get_head_size()
            self._scheduling = Scheduling(
                folder,
                block_size=vllm_config.cache_config.block_size,
                vocabulary=model.get_vocab_size(),
                shape=(text.num_hidden_layers, heads, width),
                base_sha256=base_sha256(model.model, model.revision) if extra("verify_base", True) else None,
            )
        else:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            self._states = LoadedStates(
                Path(folder),
                int(extra("max_bytes", MAX_BYTES)),
                get_tensor_model_parallel_rank(),
                parallel.tensor_parallel_size,
            )
            self._failed: set[int] = set()

    # The scheduler's side: nothing here may raise.

    def on_new_request(self, request: Any) -> None:
        """Takes back the wish for the prompt's own log-probabilities, which makes vLLM compute placeholders as if they were
        text, and keep what comes of it for requests that are right. Such a request ends without them."""
        if not _params(request):
            return
        request.skip_reading_prefix_cache = False
        if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
            log.error(
                "request %s: prompt_logprobs and echo are not supported under a prompt.", request.request_id
            )
            request.sampling_params.prompt_logprobs = None

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Positions to load for a request beyond those that are in the cache; they need not fill whole blocks."""
        matched = self._scheduling.matched(
            _params(request),
            request.prompt_token_ids,
            request.cache_salt,
            num_computed_tokens,
            request.request_id,
        )
        return matched, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note where a request's positions go: also of one that was preempted, and whose blocks are new."""
        (ids,) = blocks.get_block_ids()
        self._scheduling.allocated(
            request.request_id,
            _params(request),
            request.prompt_token_ids,
            request.cache_salt,
            ids,
            num_external_tokens,
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Hand the workers what is to be loaded before the coming step."""
        return SoftPromptMetadata(self._scheduling.take())

    # The workers' side.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Writes keys and values into the cache, layer by layer, through the attention backend's own update: whatever
        layout it has. What cannot be loaded is reported, so that its requests fail."""
        metadata = self._get_connector_metadata()
        for load in metadata.loads:
            try:
                if load.fault is not None:
                    raise ValueError(load.fault)
                self._load(load, forward_context.no_compile_layers)
            except Exception as error:
                log.error("%s cannot be loaded: %s", load.digest, error)
                self._failed.update(load.blocks)

    def _load(self, load: Load, layers: Any) -> None:
        import torch
        from vllm.model_executor.models.utils import extract_layer_index

        keys_LPHK, values_LPHK = self._states.get(load.digest)
        for name, layer in layers.items():
            cache = getattr(layer, "kv_cache", None)
            if cache is None:
                continue
            cache = cache[0] if isinstance(cache, list | tuple) else cache
            index = extract_layer_index(name)
            dtype = layer.dtype if isinstance(getattr(layer, "dtype", None), torch.dtype) else cache.dtype
            key, value = (
                tensor[index, load.start : load.end].to(cache.device, dtype)
                for tensor in (keys_LPHK, values_LPHK)
            )
            slots = torch.tensor(load.slots, dtype=torch.int64, device=cache.device)
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests that could not be loaded since the last call; vLLM ends those requests with an error."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything has been loaded before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _params(request: Any) -> dict[str, Any] | None:
    params = request.kv_transfer_params
    return params if isinstance(params, dict) and PARAMETER in params else None


def demand_plain_attention(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ValueError for a model whose cache is more than keys and values of all positions in every layer."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    transfer = vllm_config.kv_transfer_config
    if transfer.kv_load_failure_policy != "fail":
        raise ValueError(
            "softprompt: kv_load_failure_policy must be 'fail': recomputing would read placeholders as if they were text."
        )
    if vllm_config.cache_config.cache_dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError("softprompt: a quantised KV cache is not supported. Leave --kv-cache-dtype out.")
    groups = kv_cache_config.kv_cache_groups
    for group in groups:
        spec = group.kv_cache_spec
        plain = type(spec) is FullAttentionSpec and not any(
            getattr(spec, limit, None) for limit in ("sliding_window", "attention_chunk_size")
        )
        if len(groups) > 1 or not plain:
            raise ValueError(
                "softprompt: this model has layers with a sliding window, chunks, latent attention or a recurrent state "
                f"({', '.join(sorted({type(each.kv_cache_spec).__name__ for each in groups}))}), whose caches compiled prompts do "
                "not fit. Serve it with `softprompt serve`."
            )


def base_sha256(model: str, revision: str | None) -> str:
    """The digest of a base's weights that prompts record, from its safetensors files. Raises ValueError where there are none."""
    import huggingface_hub

    from softprompt.base.identity import sampled_sha256

    folder = Path(model)
    if not folder.is_dir():
        config = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
        folder = Path(config).parent if isinstance(config, str) else folder
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model}: has no safetensors files here, so that prompts cannot be checked against its weights. Download it to a "
            'folder, or set "verify_base": false in kv_connector_extra_config to trust the files of prompts.'
        )

    def weights() -> Iterator[Tensor]:
        for path in files:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield file.get_tensor(name)

    return sampled_sha256(weights())
