"""Where a base has an attention sink, deep prompts start near it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Splits
from softprompt.errors import RecipeError
from softprompt.prompt.sink import has_sink, near_first
from softprompt.tuning import starts
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan
from tiny_models import tiny_model, tiny_tokenizer


def splits_of(*texts: str) -> Splits:
    rows = tuple(Example({"text": text}, row=n) for n, text in enumerate(texts))
    return Splits(rows, rows, (), "made for the test")


ALIKE = splits_of(*["quick help"] * 4)  # what is learned is the same for all, as labels are for many
LENGTH = 6


def values(*lengths_of_layers: list[float]) -> torch.Tensor:
    """[L, P, 1, 2], every position's values as long as is said."""
    lengths_LP = torch.tensor(lengths_of_layers)
    direction = torch.tensor([0.6, -0.8])
    return lengths_LP[:, :, None, None] * direction


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        (
            [[0.4, 1.0, 9.0, 1.0], [2.0, 1.0, 1.0, 1.0]],
            True,
        ),  # half of the layers: the median, not the longest, counts
        ([[0.4, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]], False),
        (
            [[0.6, 1.0, 9.0, 1.0]],
            False,
        ),  # more than half as long as the median; one long position says nothing
        ([[1.0, 0.1, 1.0, 1.0]], False),  # another position
        ([[0.1]], False),  # no others
    ],
)
def test_a_sink_is_a_first_position_of_short_values(lengths: list[list[float]], wanted: bool) -> None:
    assert has_sink(values(*lengths)) is wanted


def test_the_start_is_four_fifths_of_the_first_position() -> None:
    found = near_first(torch.tensor([10.0, 20.0, -30.0])[None, :, None, None])
    assert found.flatten().tolist() == pytest.approx([10.0, 12.0, 2.0])  # 0.8 x 10 + 0.2 x each


def plan_of(lm: FrozenLM, *settings: str, splits: Splits = ALIKE) -> Plan:
    given = ["data.source=x", "prompt.kind=deep", f"prompt.length={LENGTH}", *settings]
    return make_plan(Recipe.from_flags({}, given), lm=lm, splits=splits)


def started(lm: FrozenLM, *settings: str, splits: Splits = ALIKE) -> tuple[torch.Tensor, torch.Tensor]:
    plan = plan_of(lm, *settings, splits=splits)
    keys, found = starts.plain_start(plan, torch.Generator().manual_seed(3))
    return keys, found


def vocabulary(lm: FrozenLM) -> tuple[torch.Tensor, torch.Tensor]:
    return started(lm, "prompt.init=vocabulary")


def assert_near_the_first(
    found: tuple[torch.Tensor, torch.Tensor], plain: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for near, own in zip(found, plain, strict=True):
        assert torch.equal(near[:, 0], own[:, 0])
        torch.testing.assert_close(near[:, 1:], 0.8 * own[:, :1] + 0.2 * own[:, 1:])


def test_a_base_without_a_sink_starts_from_vocabulary_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    assert not has_sink(vocabulary(lm)[1])
    for found, wanted in zip(started(lm), vocabulary(lm), strict=True):
        assert torch.equal(found, wanted)
    assert_near_the_first(started(lm, "prompt.init=sink"), vocabulary(lm))
    monkeypatch.setattr(starts, "has_sink", lambda values_LPHK: True)
    assert_near_the_first(started(lm), vocabulary(lm))
    assert starts.start(plan_of(lm)).lowest_share == 0.5
    assert starts.start(plan_of(lm, "prompt.init=vocabulary")).lowest_share == 1.0
    # What a user names stays what it is.
    named = started(lm, "prompt.init_text=quick help", "prompt.init=text")
    for found, wanted in zip(started(lm, "prompt.init_text=quick help"), named, strict=True):
        assert torch.equal(found, wanted)


def test_where_running_text_is_learned_the_start_is_the_same_and_steps_may_be_shorter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    monkeypatch.setattr(starts, "has_sink", lambda values_LPHK: True)
    texts = splits_of("quick help", "thank you", "the lazy dog", "act as a fox")
    assert_near_the_first(started(lm, splits=texts), vocabulary(lm))
    assert starts.start(plan_of(lm, splits=texts)).lowest_share == 0.2


def test_a_long_prompt_near_a_sink_may_take_shorter_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    monkeypatch.setattr(starts, "has_sink", lambda values_LPHK: True)
    shares = [starts.start(plan_of(lm, f"prompt.length={tokens}")).lowest_share for tokens in (20, 32)]
    assert shares == pytest.approx([0.5, 0.5 * 0.790569])  # by hand: the root of 20 / 32


def test_find_centres_on_the_first_steps_rate_whatever_the_lowest_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    lowest: list[float] = []

    def rates_of(share: float, rate: str) -> list[str]:
        monkeypatch.setattr(starts, "NEAR_SINK_SHARE", {"labels": share, "text": share})
        given = ["data.source=x", "prompt.kind=deep", "prompt.init=sink", f"tune.learning_rate={rate}"]
        out = tmp_path / f"{rate}{share}"
        tuned = tune(Recipe.from_flags({}, [*given, f"out={out}"]), lm=lm, splits=ALIKE)
        lowest.append(tuned.learning_rate)
        notes = [
            json.loads(line).get("text", "") for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            rate
            for note in notes
            for rate in re.findall(r"([\d.e-]+): ", note.partition("loss by rate: ")[2])
        ]

    tried = [rates_of(share, "find") for share in (0.5, 0.1)]
    assert len(tried[0]) == 5
    assert tried[0] == tried[1]
    for share in (0.5, 0.1):
        assert rates_of(share, "auto") == []
    assert lowest[2] == pytest.approx(5 * lowest[3], rel=0.1)  # the lowest rate of a run does depend on it


def test_vectors_cannot_start_near_a_sink() -> None:
    with pytest.raises(RecipeError, match=r"prompt\.init is sink.*prompt\.kind to deep"):
        Recipe.from_flags({}, ["data.source=x", "prompt.init=sink"])


def test_smollm2_has_a_sink_as_its_attention_says_and_the_bundled_base_has_none(
    smollm2: Path,
) -> None:
    """How much text attends to the first position is read from transformers' own attention."""
    for name, is_sink in ((str(smollm2), True), ("builtin", False)):
        lm = FrozenLM.load(name, device="cpu", dtype="float32")
        state = vocabulary(lm)
        assert has_sink(state[1]) is is_sink
        model = AutoModelForCausalLM.from_pretrained(
            lm.model.config.name_or_path, attn_implementation="eager", dtype=torch.float32
        )
        ids = lm.tokenizer(
            "The museum opens at nine and closes when the last visitor has left.", return_tensors="pt"
        )
        with torch.no_grad():
            attentions = model(input_ids=ids["input_ids"], output_attentions=True).attentions
        late = torch.stack([each[0, :, 8:, 0].mean() for each in attentions])  # a mean of each layer
        assert (float(late.median()) > 0.5) is is_sink
        if is_sink:
            assert_near_the_first(started(lm), state)
