"""The base model: loaded, frozen, known by its fingerprint, with what everyone needs of it: embed, hidden, head, loss.

No code changes a weight; `weights_sha256` before and after a run proves it.
"""

from __future__ import annotations

import hashlib
import html
import inspect
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from softprompt.base.context_length import demand_one_vector, stated_context
from softprompt.base.disk_cache import Stamp
from softprompt.base.identity import (
    base_files,
    config_identity,
    sampled_sha256,
    tokenizer_sha256,
    weights_sha256,
)
from softprompt.base.locate import demand_no_adapter, load_local_first, locate
from softprompt.base.nll import Head, token_nll
from softprompt.base.placement import Placed, place
from softprompt.base.processes import own_gpu, started_processes
from softprompt.base.quantised import (
    QUANTISATIONS,
    demand_plain_ends,
    demand_whole_layers,
    is_quantised,
    keep_weights,
    quantised_options,
    quantisers,
    stored,
    weight_count,
)
from softprompt.base.split import (
    Shard,
    fetched,
    fetched_module,
    is_dispatched,
    is_split,
    own_part,
    split_layers,
    split_options,
    whole,
)
from softprompt.base.whole import demand_causal_lm, demand_finite, demand_ids_in_table, demand_whole
from softprompt.data.batch import Batch
from softprompt.errors import BaseError, DataError
from softprompt.prompt.soft_prompt import Fingerprint, Plain
from softprompt.settings.base_settings import Spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenLM:
    """A causal language model that nobody trains. Make one with `load` (`from_pretrained`) or `wrap`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None = None,
        dtype_reason: str = "as given",
        files: Stamp | None = None,
    ) -> None:
        demand_causal_lm(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.dtype_reason = dtype_reason
        self.device: torch.device = _device(model)
        self._embedding: nn.Module = model.get_input_embeddings()
        keep_weights(model, name)
        self.body: Any = _body(model, name)
        self.head = _head(model, name)
        demand_plain_ends(self._embedding.weight, self.head.weight_VD, name)
        self.dtype: torch.dtype = self.head.weight_VD.dtype
        self._takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self.num_layers = int(self.config.num_hidden_layers)
        self.vocab_size = int(self.embedding_VD.shape[0])
        self.width = int(self.embedding_VD.shape[1])
        demand_ids_in_table(tokenizer, self.vocab_size, name)
        self.max_positions = stated_context(self.config)
        demand_finite(model, name)
        keys = self._check_against_transformers()
        self.layer_devices: tuple[torch.device, ...] = tuple(key.device for key in keys)
        kv_heads, head_width = self._kv_shape(keys[0])
        self.fingerprint: Fingerprint = Fingerprint(
            name=name,
            revision=revision,
            sha256=sampled_sha256(weight for _, weight in fetched(model)),
            width=self.width,
            layers=self.num_layers,
            vocabulary=self.vocab_size,
            kv_heads=kv_heads,
            head_width=head_width,
            weights_sha256=weights_sha256(model, files),
            tokenizer_sha256=tokenizer_sha256(tokenizer, files),
            config=config_identity(self.config),
        )
        self._sealed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_sealed" in vars(self):
            raise AttributeError(
                f"FrozenLM.{name}: a loaded base never changes, since runs, evaluations and servers share it. Settings "
                "belong to a run, a FastLoss or a running batch."
            )
        super().__setattr__(name, value)

    @classmethod
    def load(
        cls,
        name_or_path: str = "builtin",
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        spread: Spread = "none",
    ) -> FrozenLM:
        """Loads from a local folder, the local hub cache or the hub, in that order; `builtin` is the bundled base.

        Raises BaseError if there is no such model, or where it is not one that a prompt can be placed in."""
        where, name = locate(name_or_path)
        on = choose_device(device)
        quantisation = QUANTISATIONS.get(dtype)
        chosen, reason = choose_dtype("auto" if quantisation else dtype, on)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        weights: dict[str, Any] = {"dtype": chosen, "use_safetensors": None}
        if quantisation:
            demand_whole_layers(spread, name)
            weights |= quantised_options(dtype, chosen, on)
        weights |= split_options(spread, name)
        files = base_files(where, revision)

        def read_weights(local: bool) -> Any:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                where,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report names them, and they are refused with the others
                **options,
                **weights,
            )
            model, report = loaded
            demand_no_adapter(model, name)
            demand_whole(model, report, name)
            return model

        tokenizer, model = load_local_first(where, name, options, read_weights)
        loaded_revision = revision or getattr(model.config, "_commit_hash", None)
        if is_quantised(model):
            demand_whole_layers(spread, name)
            how = f"{quantisation.bits} bits" if quantisation else "few bits, as its files hold them"
            reason = f"weights in {how} ({quantisers(model)}), the rest: {reason}"
        elif spread == "none":
            model = model.to(on)
        if spread == "layers":
            split_layers(model, int(model.config.get_text_config().num_hidden_layers), on, name)
        return cls(model, tokenizer, name=name, revision=loaded_revision, dtype_reason=reason, files=files)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str = "builtin",
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        spread: Spread = "none",
    ) -> FrozenLM:
        """The same as `load`, under the name that transformers gives it."""
        return cls.load(
            name_or_path,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            spread=spread,
        )

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, name: str = "wrapped") -> FrozenLM:
        """Takes a transformers causal LM that is already in memory. It is frozen and put into eval mode, in place."""
        return cls(model, tokenizer, name=name)

    def __repr__(self) -> str:
        positions = f"{self.max_positions:,} positions" if self.max_positions else "no limit of positions"
        return (
            f"FrozenLM({self.name!r}, {self.num_parameters:,} parameters, {self.num_layers} layers of width "
            f"{self.width}, {positions}, {self._dtype_name} on {self.device})"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = {
            "model": f"{type(self.model).__name__}{f', revision {self.revision}' if self.revision else ''}",
            "parameters": f"{self.num_parameters:,}, all frozen",
            "layers, width": f"{self.num_layers}, {self.width}",
            "vocabulary": f"{self.vocab_size:,}",
            "positions": f"{self.max_positions:,}" if self.max_positions else "no limit",
            "dtype": f"{self._dtype_name} ({self.dtype_reason})",
            "device": self.device,
        }
        cells = "".join(
            f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in rows.items()
        )
        return f"<table><caption>{html.escape(self.name)}</caption>{cells}</table>"

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> Any:
        """The config of the language model, where the base has other parts too."""
        return self.model.config.get_text_config()

    @property
    def embedding_VD(self) -> Tensor:
        """The input embedding table."""
        return whole(_weight(self._embedding))

    @property
    def is_split(self) -> bool:
        """Whether several processes hold the weights in parts, and so read the same rows in step."""
        return is_split(self.model)

    @property
    def is_whole(self) -> bool:
        """Whether all weights lie on one device of this process."""
        return not (self.is_split or is_dispatched(self.model))

    @property
    def num_parameters(self) -> int:
        """The number of weights; a tied matrix counts once."""
        return sum(weight_count(weight) for weight in self.model.parameters())

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to the vectors [..., D] that the first layer reads, scaled where the model scales them."""
        try:
            with torch.no_grad():
                vectors: Tensor = self._embedding(ids)
        except IndexError as error:
            raise DataError(
                f"{self.name}: found the token id {int(ids.max())}, wanted ids below {self.vocab_size:,}, the rows of "
                "its embedding table. A text spells a special token that the base has no row for; write it otherwise."
            ) from error
        return vectors

    def hidden(
        self,
        embeddings_BSD: Tensor,
        mask_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        past: Any = None,
    ) -> Tensor:
        """Last hidden states [B, S, D], ready for the head.

        `past` (a transformers cache) is read and extended in place, and `mask_BS` then covers it too. Without a mask
        every position is real; without positions they follow from the cache's length."""
        return self.states(Placed(embeddings_BSD, mask_BS, positions_BS, past))

    def states(self, placed: Placed, body: Any = None) -> Tensor:
        """Like `hidden`, of a placed batch; `body` is read in place of the base's own (a copy that shares its weights)."""
        body = self.body if body is None else body
        options: dict[str, Any] = {"use_cache": placed.past is not None}
        if placed.past is not None:
            options["past_key_values"] = placed.past
        if placed.positions_BS is not None and self._takes_positions:
            options["position_ids"] = placed.positions_BS
        output = body(inputs_embeds=placed.embeddings_BSD, attention_mask=placed.mask_BS, **options)
        states: Tensor = output[0]
        return states.to(self.device)  # the last layer may lie on another device

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V], with the architecture's own scale and soft cap."""
        return self.head.logits(hidden)

    def token_nll(self, batch: Batch, prompt: Plain | None = None) -> Tensor:
        """Loss in nats of every trained token, float32 [N], in the order of the batch's rows and positions.

        `prompt` is what is learned or judged: (vectors [P, D],), (keys, values) [L, P, H, K] each, or None for the
        untouched base. Differentiable towards it, and towards nothing else. This is the plain reference;
        softprompt.loss.fast.FastLoss gives the same values in less time."""
        batch = batch.to(self.device)
        hidden_BSD = self.states(place(self, batch, prompt))
        before_BS = batch.trained_BS[:, 1:]  # the state at s predicts the token at s + 1
        return token_nll(hidden_BSD[:, :-1][before_BS], batch.ids_BS[:, 1:][before_BS], self.head)

    def nll(self, batch: Batch, prompt: Plain | None = None) -> tuple[Tensor, int]:
        """Summed loss in nats, and the number of tokens it sums over."""
        nll_N = self.token_nll(batch, prompt)
        return nll_N.sum(), nll_N.numel()

    def weights_sha256(self) -> str:
        """Digest of every byte of every weight as it lies in memory now: equal before and after means untouched."""
        digest = hashlib.sha256()
        scales: dict[str, Tensor] = {}
        if is_quantised(self.model):  # the scales are no parameters
            named = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            scales = {name: value for name, value in self.model.state_dict().items() if name not in named}
        for name, weight in chain(fetched(self.model, by_name=True), sorted(scales.items())):
            digest.update(name.encode())
            for part in stored(whole(weight)):
                content: Any = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digest.update(content)
        return digest.hexdigest()

    def _kv_shape(self, keys_1HTK: Tensor) -> tuple[int, int]:
        """Key/value heads of the whole base, and their width."""
        heads = int(keys_1HTK.shape[1])
        if self.head.shard is not None:  # this process has its part of the heads
            heads = int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)
        return heads, int(keys_1HTK.shape[3])

    def _check_against_transformers(self) -> list[Tensor]:
        """Demands that embed, body and head give the model's own logits. Returns every layer's keys of a few tokens."""
        ids_BT = (torch.arange(1, 6, device=self.device) * 7 % self.vocab_size)[None]
        with torch.no_grad():
            theirs = self.model(input_ids=ids_BT, use_cache=True)
            layers = getattr(getattr(theirs, "past_key_values", None), "layers", [])
            keys: list[Any] = [getattr(layer, "keys", None) for layer in layers]
            if len(keys) != self.num_layers or any(
                not isinstance(key, Tensor) or key.dim() != 4 for key in keys
            ):
                raise BaseError(
                    f"{self.name}: {type(self.model).__name__} keeps a state that is not keys and values of every "
                    "layer (a recurrent or hybrid model, or one without a cache). A prompt cannot be compiled for it; "
                    "choose another base."
                )
            try:
                states_BTD = self.hidden(self.embed(ids_BT))
            except Exception as error:
                raise BaseError(
                    f"{self.name}: {type(self.model).__name__} cannot read embeddings in place of tokens "
                    f"({type(error).__name__}: {error}). Choose another base."
                ) from error
            ours_BTV = self.logits(states_BTD)
        difference = (ours_BTV.float() - theirs.logits.float()).abs().max().item()
        scale = theirs.logits.float().abs().max().item()
        if not difference <= 16 * torch.finfo(self.dtype).eps * max(scale, 1.0):
            raise BaseError(
                f"{self.name}: {type(self.model).__name__} computes its logits in a way that softprompt does not know "
                f"(they differ by {difference:.3g}). It is refused rather than trained wrongly; choose another base."
            )
        return keys


def _device(model: Any) -> torch.device:
    """The device that the base reads its input on."""
    first = next(model.parameters())
    if not first.is_meta:
        return torch.device(first.device)
    # accelerate fetches the weights of the embedding table to where that computes.
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)


def _weight(layer: Any) -> Tensor:
    """A layer's weight, fetched where it lies on disk or in the CPU's memory."""
    if not layer.weight.is_meta:
        weight: Tensor = layer.weight
        return weight
    with fetched_module(layer) as module:
        kept: Tensor = module.weight.detach().clone()  # type: ignore[operator]
        return kept


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", own_gpu()) if started_processes() > 1 else torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BaseError(
            f"device: found {wanted}, which this machine does not have. Take auto or cpu."
        ) from error
    return device


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype for this machine, and why."""
    if wanted != "auto":
        if wanted not in DTYPES:
            raise BaseError(f"dtype: found {wanted}, wanted auto, {', '.join([*DTYPES, *QUANTISATIONS])}.")
        if wanted == "float16" and device.type == "cpu":
            raise BaseError("dtype: float16 is hundreds of times slower than bfloat16 on a CPU. Take auto.")
        return DTYPES[wanted], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bfloat16"
        return torch.float16, "this GPU has no bfloat16"
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16, "this CPU has bfloat16 instructions"
    return torch.float32, f"this {device.type} has no fast bfloat16"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    checks = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check is not None and check() for check in checks)


def _body(model: Any, name: str) -> Any:
    body = getattr(model, "base_model", None)
    if body is model:  # Llama 4 names its body otherwise
        body = getattr(model, "model", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BaseError(
            f"{name}: {type(model).__name__} is an encoder-decoder. softprompt tunes causal (decoder-only) models."
        )
    demand_one_vector(model.config.get_text_config(), type(model).__name__, name)
    if body is None:
        raise BaseError(
            f"{name}: {type(model).__name__} has no body apart from its head. Choose another base."
        )
    return body


def _head(model: Any, name: str) -> Head:
    layer = model.get_output_embeddings()
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise BaseError(
            f"{name}: {type(model).__name__} has no output layer over the vocabulary. Choose another base."
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    return Head(
        own_part(_weight(layer)),
        None if getattr(layer, "bias", None) is None else own_part(layer.bias),
        scale,
        float(softcap) if softcap else None,
        Shard.of(layer.weight),
    )
