"""What vLLM's connector refuses when vLLM starts, and takes out of requests: with stand-ins for vLLM's own classes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

NAME = "softprompt.scale.vllm_connector"


@dataclass
class FullAttentionSpec:
    sliding_window: int | None = None
    attention_chunk_size: int | None = None


@dataclass
class MLAAttentionSpec(FullAttentionSpec):
    """Latent attention: one compressed state a position, in a class below the plain one's."""


@dataclass
class SlidingWindowSpec:
    sliding_window: int = 128


@dataclass
class MambaSpec:
    """A recurrent state."""


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    class Base:
        pass

    base = {
        "KVConnectorBase_V1": Base,
        "KVConnectorMetadata": Base,
        "KVConnectorRole": Enum("KVConnectorRole", "SCHEDULER WORKER"),
    }
    contents: dict[str, dict[str, Any]] = {
        "vllm.distributed.kv_transfer.kv_connector.v1.base": base,
        "vllm.v1.kv_cache_interface": {"FullAttentionSpec": FullAttentionSpec},
    }
    for path, names in contents.items():
        parts = path.split(".")
        for length in range(1, len(parts)):
            package = ".".join(parts[:length])
            if package not in contents:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        module = ModuleType(path)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def configs(*specs: Any, policy: str = "fail", dtype: str = "auto") -> tuple[Any, Any]:
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    vllm = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        cache_config=SimpleNamespace(cache_dtype=dtype),
    )
    return vllm, SimpleNamespace(kv_cache_groups=groups)


@pytest.mark.parametrize(
    "specs",
    [
        [SlidingWindowSpec()],
        [FullAttentionSpec(), SlidingWindowSpec()],
        [FullAttentionSpec(), MambaSpec()],
        [MambaSpec()],
        [MLAAttentionSpec()],
        [
            FullAttentionSpec(sliding_window=4096)
        ],  # vLLM without its hybrid cache: all columns are kept, some are seen
        [FullAttentionSpec(attention_chunk_size=8192)],
    ],
    ids=["sliding", "hybrid", "hybrid-recurrent", "recurrent", "latent", "window", "chunks"],
)
def test_a_model_whose_cache_is_more_than_keys_and_values_of_all_positions_is_refused(
    connector: ModuleType, specs: list[Any]
) -> None:
    with pytest.raises(ValueError, match="whose caches compiled prompts do not fit"):
        connector.demand_plain_attention(*configs(*specs))


def test_a_plain_model_is_taken_and_settings_that_would_answer_wrongly_are_refused(
    connector: ModuleType,
) -> None:
    connector.demand_plain_attention(*configs(FullAttentionSpec()))
    with pytest.raises(ValueError, match="must be 'fail'"):
        connector.demand_plain_attention(*configs(FullAttentionSpec(), policy="recompute"))
    with pytest.raises(ValueError, match="quantised KV cache"):
        connector.demand_plain_attention(*configs(FullAttentionSpec(), dtype="fp8"))


def test_log_probabilities_of_placeholders_are_never_computed(connector: ModuleType) -> None:
    """vLLM would read the placeholders as text for them, and keep that in its cache for requests that are right."""
    asking = connector.SoftPromptConnector.__new__(connector.SoftPromptConnector)

    def request(params: Any) -> Any:
        return SimpleNamespace(
            request_id="r",
            kv_transfer_params=params,
            skip_reading_prefix_cache=True,
            sampling_params=SimpleNamespace(prompt_logprobs=1),
        )

    ours, other = request({"softprompt": "d"}), request(None)
    for each in (ours, other, request({"another": "connector's"})):
        asking.on_new_request(each)
    assert ours.sampling_params.prompt_logprobs is None
    assert ours.skip_reading_prefix_cache is False
    assert other.sampling_params.prompt_logprobs == 1
