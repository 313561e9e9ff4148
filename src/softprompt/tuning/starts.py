"""The start that a recipe names, on the base and rows at hand, in the form that is to be trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.inference.compiled import read_ids, text_state, vectors_state
from softprompt.prompt import init
from softprompt.prompt.reparam import FORMS, Form, as_plain, as_rows
from softprompt.prompt.sink import has_sink, near_first
from softprompt.prompt.soft_prompt import Plain, SoftPrompt
from softprompt.tuning.compaction import compact, moved
from softprompt.tuning.init_from import read_prompts, start_ids, text_ids
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe

COMPACTION_ROWS = 48  # training rows whose queries say which keys of a long text matter
# Of the first step's rate, down to which steps may go that start near a sink (Form.lowest_share), with up to so many tokens.
NEAR_SINK_SHARE, NEAR_SINK_TOKENS = {"labels": 0.5, "text": 0.2}, 20
# Of what the first layer gives out, by root mean squares: how large the vectors of a scaled start are, if not larger anyway.
SCALED_SHARE, SCALE_TOKENS = 0.5, 64


def start(plan: Plan) -> Form:
    """The trained form at its starting values."""
    recipe = plan.recipe
    generator = torch.Generator().manual_seed(recipe.tune.seed)
    plain, near_sink = _start(plan, generator)
    table_mW = _table(plan, generator) if recipe.prompt.form == "superposition" else torch.empty(0)
    form = FORMS[recipe.prompt.form](plain, table_mW, recipe.prompt.form_width, generator)
    form.first_layer = recipe.prompt.first_layer(plan.lm.num_layers)
    form.lowest_share = _lowest_share(plan) if near_sink else 1.0
    return form


def _lowest_share(plan: Plan) -> float:
    """`Form.lowest_share` of a start near a sink.

    What the first slope asks for is nearly the same for all P tokens, and a step that gives each direction its due (Muon) goes that
    way with about 1/sqrt(P) of its length. So the rate that is measured there grows with sqrt(P), and the one that suits what
    sets the tokens apart does not (figures in LOG.md)."""
    share = NEAR_SINK_SHARE["labels" if plan.loss_falls_to_zero else "text"]
    return share * min(1.0, math.sqrt(NEAR_SINK_TOKENS / plan.template.soft_length))


def plain_start(plan: Plan, generator: torch.Generator) -> Plain:
    """The plain prompt that learning starts from."""
    return _start(plan, generator)[0]


def _start(plan: Plan, generator: torch.Generator) -> tuple[Plain, bool]:
    """That prompt, and whether it lies near the base's attention sink."""
    name = named_init(plan.recipe)
    if plan.recipe.prompt.kind == "soft":
        return STARTS[name](plan, generator), False
    if name != "auto":
        return DEEP_STARTS[name](plan, generator), name == "sink"
    plain = DEEP_STARTS["vocabulary"](plan, generator)
    near_sink = has_sink(plain[1])
    return (_near_sink(plain) if near_sink else plain), near_sink


def named_init(recipe: Recipe) -> str:
    """`prompt.init` with what its `auto` means; `auto` itself for a deep prompt that starts from vocabulary or near the sink, as the
    base's keys and values say.

    A rate that is given suits vectors of the table's own size, so only an automatic one starts from larger ones."""
    prompt = recipe.prompt
    if prompt.init != "auto":
        return prompt.init
    if prompt.init_text or prompt.init_from:
        return "text" if prompt.init_text else "prompt"
    if prompt.kind == "deep":
        return "auto"
    is_scaled = isinstance(recipe.tune.learning_rate, str) and prompt.form == "direct"
    return "scaled" if is_scaled else "vocabulary"


def start_scale(recipe: Recipe, lm: FrozenLM) -> float:
    """By how much a start's vectors, and the steps that move them, are larger than the table's: 1 or more for `init: scaled`, else 1.

    In most bases the first layer adds numbers to its input that are far larger than embeddings, by root mean squares 19 times as large on
    SmolLM2-135M and 30 times on TinyStories-656K. Beside these nothing is left of a vector of the table's size in what later layers
    read, so that all it says it says through the first one. One of half that size is heard by all (figures in LOG.md)."""
    if named_init(recipe) != "scaled":
        return 1.0
    entering, leaving = first_layer_sizes(lm)
    return max(1.0, SCALED_SHARE * leaving / entering)


@torch.no_grad()
def first_layer_sizes(lm: FrozenLM) -> tuple[float, float]:
    """The root mean squares of what enters the base's first layer and of what leaves it, for a usual token: the median of frequent
    ones, since a base's attention sink is far larger there."""
    ids = torch.linspace(0, min(init.FREQUENT, lm.vocab_size) - 1, SCALE_TOKENS).long().to(lm.device)
    read = lm.body(inputs_embeds=lm.embed(ids)[None], output_hidden_states=True, use_cache=False)
    sizes = [
        states_1SD.float().square().mean(-1).sqrt().median().item() for states_1SD in read.hidden_states[:2]
    ]
    return sizes[0], sizes[1]


def _table(plan: Plan, generator: torch.Generator) -> Tensor:
    """Embeddings to superpose, frequent tokens drawn at random; for a deep prompt as the base reads each alone."""
    rows_mD = _sampled(plan, plan.recipe.prompt.form_width or 128, generator)
    if plan.recipe.prompt.kind != "deep":
        return rows_mD
    return torch.cat([as_rows(vectors_state(plan.lm, row_D[None])) for row_D in rows_mD])


def _random(plan: Plan, generator: torch.Generator) -> Tensor:
    return init.random_at_scale(frequent_vectors(plan.lm), plan.template.soft_length, generator)


def _vocabulary(plan: Plan, generator: torch.Generator) -> Tensor:
    return _sampled(plan, plan.template.soft_length, generator)


def _sampled(plan: Plan, count: int, generator: torch.Generator) -> Tensor:
    rows = init.sampled_vocabulary(
        torch.arange(plan.lm.vocab_size)[:, None].float(),
        count,
        generator,
        plan.lm.tokenizer.all_special_ids,
    )
    return plan.lm.embed(rows[:, 0].long().to(plan.lm.device)).float().cpu()


def _scaled(plan: Plan, generator: torch.Generator) -> Tensor:
    return plan.start_scale * _vocabulary(plan, generator)


def _text(plan: Plan, generator: torch.Generator) -> Tensor:
    ids = start_ids(plan.lm, plan.recipe.prompt.init_text or "")
    return init.token_embeddings(_embedded(plan.lm, ids), plan.template.soft_length)


def _labels(plan: Plan, generator: torch.Generator) -> Tensor:
    target = plan.template.target or ""
    counted = Counter(example.fields[target] for example in plan.splits.train)
    vectors = [
        _embedded(plan.lm, text_ids(plan.lm, " " + label.strip())) for label, _ in counted.most_common()
    ]
    return init.class_labels(vectors, frequent_vectors(plan.lm), plan.template.soft_length, generator)


def _from_prompts(combine: Callable[[Sequence[Tensor], int], Tensor]) -> Callable[..., Plain]:
    """A start from learned prompts of the same base: vectors, or what a deep prompt holds."""

    def combined(plan: Plan, generator: torch.Generator) -> Plain:
        prompts = read_prompts(plan.recipe, plan.lm)
        length = plan.template.soft_length
        if plan.recipe.prompt.kind == "soft":
            return (combine([prompt.plain[0] for prompt in prompts], length),)
        deep = [
            vectors_state(plan.lm, prompt.embeddings_PD) if isinstance(prompt, SoftPrompt) else prompt.plain
            for prompt in prompts
        ]
        if combine is init.concatenation:
            deep = _one_after_another(plan.lm, deep, length)
        layers, _, heads, width = deep[0][0].shape
        return as_plain(combine([as_rows(plain) for plain in deep], length), (layers, length, heads, width))

    return combined


def _one_after_another(lm: FrozenLM, prompts: Sequence[Plain], length: int) -> list[Plain]:
    """Deep prompts, repeated until they have `length` positions, with keys as they are at their places in that row.

    A key holds its position where the base rotates keys; each prompt's are turned on by all that stands before it."""
    placed: list[Plain] = []
    before = 0
    while not placed or before < length:
        for plain in prompts:
            placed.append(moved(lm, plain, before))
            before += plain[0].shape[1]
    return placed


def _alone(start: Callable[[Plan, torch.Generator], Tensor]) -> Callable[[Plan, torch.Generator], Plain]:
    """A soft start: the vectors as they are."""
    return lambda plan, generator: (start(plan, generator),)


def _read_by_base(
    start: Callable[[Plan, torch.Generator], Tensor],
) -> Callable[[Plan, torch.Generator], Plain]:
    """A deep start: the keys and values that the base holds after reading a shallow one."""
    return lambda plan, generator: vectors_state(plan.lm, start(plan, generator))


def _zero(plan: Plan, generator: torch.Generator) -> Plain:
    keys_LPHK, values_LPHK = vectors_state(plan.lm, _vocabulary(plan, generator))
    return torch.zeros_like(keys_LPHK), torch.zeros_like(values_LPHK)


def _sink(plan: Plan, generator: torch.Generator) -> Plain:
    return _near_sink(vectors_state(plan.lm, _vocabulary(plan, generator)))


def _near_sink(state: Plain) -> Plain:
    return tuple(near_first(tensor_LPHK) for tensor_LPHK in state)


def _text_read_by_base(plan: Plan, generator: torch.Generator) -> Plain:
    """The key/value state after reading the text; a text longer than the prompt is cut down to the keys that matter to
    the training rows, rather than cut off (tuning/compaction.py)."""
    text, length = plan.recipe.prompt.init_text or "", plan.template.soft_length
    ids = start_ids(plan.lm, text)
    if len(ids) <= length:
        return text_state(plan.lm, text, length)
    rows = [row.ids for row in islice(plan.train.encoded, COMPACTION_ROWS)]
    return compact(plan.lm, read_ids(plan.lm, ids), rows, length).plain


VECTORS: dict[str, Callable[[Plan, torch.Generator], Tensor]] = {
    "random": _random,
    "vocabulary": _vocabulary,
    "text": _text,
    "labels": _labels,
}
FROM_PROMPTS: dict[str, Callable[[Plan, torch.Generator], Plain]] = {
    "prompt": _from_prompts(lambda prompts, length: init.resized(prompts[0], length)),
    "mean": _from_prompts(init.mean),
    "concatenation": _from_prompts(init.concatenation),
}
STARTS: dict[str, Callable[[Plan, torch.Generator], Plain]] = {
    **{name: _alone(vectors) for name, vectors in VECTORS.items()},
    "scaled": _alone(_scaled),
    **FROM_PROMPTS,
}
DEEP_STARTS: dict[str, Callable[[Plan, torch.Generator], Plain]] = {
    **{name: _read_by_base(vectors) for name, vectors in VECTORS.items()},
    "text": _text_read_by_base,
    "zero": _zero,
    "sink": _sink,
    **FROM_PROMPTS,
}


def frequent_vectors(lm: FrozenLM) -> Tensor:
    """The first layer's inputs for the most frequent tokens: not the table itself where the base scales it (Gemma)."""
    return _embedded(lm, range(min(init.FREQUENT, lm.vocab_size)))


def _embedded(lm: FrozenLM, ids: Sequence[int]) -> Tensor:
    return lm.embed(torch.tensor(ids, device=lm.device)).float().cpu()
