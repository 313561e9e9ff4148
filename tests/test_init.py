"""Where a prompt starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base.kv import new_cache
from softprompt.data.batch import collate
from softprompt.data.example import Example, Splits
from softprompt.errors import RecipeError, WrongBase
from softprompt.inference.compiled import as_deep
from softprompt.prompt import init
from softprompt.store.artifact import save_prompt
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from test_learn import SPLITS, learn, lm_of, recipe, vectors


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def started(out: Path, *overrides: str, lm: Any = None, splits: Splits = SPLITS) -> torch.Tensor:
    """The prompt at step 0."""
    plan = make_plan(recipe(out, *overrides), lm=lm or lm_of(), splits=splits)
    found = start(plan)()
    return found.detach() if isinstance(found, torch.Tensor) else found[0].detach()


def test_a_random_start_has_the_tables_own_scale() -> None:
    table_VD = torch.randn(5_000, 16, generator=generator()) * 0.02 + 0.01
    found_PD = init.random_at_scale(table_VD, 2_000, generator())
    assert found_PD.std().item() == pytest.approx(0.02, rel=0.02)
    assert found_PD.mean().item() == pytest.approx(0.01, abs=0.0005)


@pytest.mark.parametrize("name", ["random", "vocabulary"])
def test_a_start_has_the_scale_that_the_first_layer_reads_where_the_base_scales_its_table(
    tmp_path: Path, name: str
) -> None:
    """Gemma multiplies its embeddings by the root of its width: 5.66 for 32."""
    lm = lm_of("Gemma")
    found_PD = started(tmp_path, f"prompt.init={name}", "prompt.length=100", lm=lm)
    assert found_PD.std().item() == pytest.approx(lm.embedding_VD.std().item() * 32**0.5, rel=0.1)


@pytest.mark.parametrize("size", [0.0, 1.0, 5.0])
def test_an_automatic_start_is_vocabulary_of_half_the_size_that_the_first_layer_gives_out(
    tmp_path: Path, size: float
) -> None:
    """A layer that adds nothing, one that adds little, and one that adds far more than it reads. Both sizes by transformers' own reading of
    tokens by their ids; the vectors are never made smaller."""
    lm = lm_of()
    with torch.no_grad():
        for name, weight in lm.model.model.layers[0].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(size)
        ids = torch.linspace(0, lm.vocab_size - 1, 64).long()
        read = lm.model(input_ids=ids[None], output_hidden_states=True).hidden_states
    before, after = (states[0].square().mean(-1).sqrt().median().item() for states in read[:2])
    wanted = max(1.0, 0.5 * after / before)
    assert (wanted == 1.0) == (size == 0.0)
    auto = ["tune.learning_rate=auto"]
    vocabulary_PD = started(tmp_path, *auto, "prompt.init=vocabulary", lm=lm)
    torch.testing.assert_close(started(tmp_path, *auto, lm=lm), wanted * vocabulary_PD)
    torch.testing.assert_close(started(tmp_path, "prompt.init=scaled", lm=lm), wanted * vocabulary_PD)
    bound = make_plan(recipe(tmp_path, *auto, "prompt.init=vocabulary"), lm=lm, splits=SPLITS).learning_rate
    scaled = make_plan(recipe(tmp_path, *auto), lm=lm, splits=SPLITS).learning_rate
    assert scaled == pytest.approx(wanted * bound, rel=0.06)  # two digits each


@pytest.mark.parametrize(
    "overrides",
    [["tune.learning_rate=0.2"], ["tune.learning_rate=auto", "prompt.form=residual"]],
    ids=["a rate that is given", "another form"],
)
def test_where_the_steps_suit_the_table_so_does_an_automatic_start(
    tmp_path: Path, overrides: list[str]
) -> None:
    vocabulary_PD = started(tmp_path, *overrides, "prompt.init=vocabulary")
    torch.testing.assert_close(started(tmp_path, *overrides), vocabulary_PD)


def test_keys_and_values_have_no_scaled_start(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"prompt\.init is scaled, .* Set prompt\.kind to soft"):
        recipe(tmp_path, "prompt.kind=deep", "prompt.init=scaled")


def test_sampled_vocabulary_is_different_rows_of_the_table_without_special_ones() -> None:
    table_VD = torch.arange(12.0)[:, None].expand(12, 4)
    found_PD = init.sampled_vocabulary(table_VD, 8, generator(), leave_out=[0, 1, 2])
    rows = found_PD[:, 0].tolist()
    assert len(set(rows)) == 8
    assert set(rows) <= set(range(3, 12))


def test_more_samples_than_tokens_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"found 13, but the base has 12 tokens"):
        init.sampled_vocabulary(torch.ones(12, 4), 13, generator())


def test_labels_come_first_each_as_the_mean_of_its_tokens_the_most_frequent_first(tmp_path: Path) -> None:
    lm = lm_of()
    labels = ["complaint", "no complaint", "complaint"]
    rows = tuple(Example({"text": "my order", "label": one}, row=n) for n, one in enumerate(labels))
    found_PD = started(
        tmp_path, "prompt.init=labels", "data.target=label", "data.template={soft}{text} {label}",
        lm=lm, splits=Splits(rows, rows[:1], (), "x"),
    )  # fmt: skip
    for place, label in enumerate(("complaint", "no complaint")):
        ids = lm.tokenizer(" " + label)["input_ids"]
        torch.testing.assert_close(found_PD[place], lm.embed(torch.tensor(ids)).mean(0))


def test_a_deep_text_start_is_the_state_that_transformers_keeps_of_the_text(tmp_path: Path) -> None:
    lm = lm_of()
    text = "thank you for the quick help"
    plan = make_plan(
        recipe(tmp_path, "prompt.kind=deep", f"prompt.init_text={text}", "prompt.length=null"),
        lm=lm,
        splits=SPLITS,
    )
    keys_LPHK, values_LPHK = start(plan)()
    with torch.no_grad():
        cache = lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]), use_cache=True).past_key_values
    for layer in range(2):
        torch.testing.assert_close(keys_LPHK[layer].detach(), cache.layers[layer].keys[0].transpose(0, 1))
        torch.testing.assert_close(values_LPHK[layer].detach(), cache.layers[layer].values[0].transpose(0, 1))


def test_a_deep_text_start_shorter_than_its_text_keeps_what_matters_of_it(tmp_path: Path) -> None:
    """Token by token: losses behind 8 positions against those behind the whole text and behind its first 8 tokens."""
    lm = lm_of()
    text = "I want you to act as a logistician. The quick brown fox jumps over the lazy dog. thank you for the quick help"
    ids = lm.tokenizer(text)["input_ids"]

    def losses(text: str, length: int) -> torch.Tensor:
        flags = ("prompt.kind=deep", f"prompt.init_text={text}", f"prompt.length={length}")
        plan = make_plan(recipe(tmp_path, *flags), lm=lm, splits=SPLITS)
        with torch.no_grad():
            return lm.token_nll(collate(list(plan.train.encoded)), start(plan)())

    whole, compacted, cut = losses(text, len(ids)), losses(text, 8), losses(lm.tokenizer.decode(ids[:8]), 8)
    assert float((compacted - whole).abs().mean()) < 0.7 * float((cut - whole).abs().mean())


@pytest.fixture
def learned(tmp_path: Path) -> list[Any]:
    """Two prompts of 4 and 3 vectors, on disk as a and b."""
    return [
        learn(tmp_path / name, f"prompt.length={length}", "tune.epochs=1", f"tune.seed={seed}")
        for name, length, seed in (("a", 4, 0), ("b", 3, 1))
    ]


def test_another_prompt_is_taken_over_as_it_is(tmp_path: Path, learned: list[Any]) -> None:
    found = started(tmp_path / "c", f"prompt.init_from=[{tmp_path / 'b'}]", "prompt.length=null")
    assert torch.equal(found, vectors(learned[1]))


def test_a_run_that_starts_from_a_prompt_starts_at_its_loss(tmp_path: Path, learned: list[Any]) -> None:
    again = learn(tmp_path / "c", f"prompt.init_from=[{tmp_path / 'a'}]")
    assert again.nll_before == pytest.approx(learned[0].nll_after, abs=1e-6)


def test_the_mean_of_two_prompts_is_that_of_their_rows(tmp_path: Path, learned: list[Any]) -> None:
    both = f"prompt.init_from=[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    found = started(tmp_path / "c", both, "prompt.init=mean", "prompt.length=3")
    torch.testing.assert_close(found, (vectors(learned[0])[:3] + vectors(learned[1])) / 2)


def test_a_concatenation_is_as_long_as_its_parts_together(tmp_path: Path, learned: list[Any]) -> None:
    both = f"prompt.init_from=[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    found = started(tmp_path / "c", both, "prompt.init=concatenation", "prompt.length=null")
    assert torch.equal(found, torch.cat([vectors(learned[0]), vectors(learned[1])]))


def test_a_deep_prompt_starts_from_a_soft_ones_state(tmp_path: Path, learned: list[Any]) -> None:
    """So the deep run starts at the very loss of the soft prompt."""
    deep = learn(
        tmp_path / "c", f"prompt.init_from=[{tmp_path / 'a'}]", "prompt.kind=deep", "tune.max_steps=1"
    )
    assert deep.nll_before == pytest.approx(learned[0].nll_after, abs=1e-5)


def test_the_mean_of_deep_prompts_is_that_of_their_keys_and_values(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        learn(tmp_path / name, "prompt.kind=deep", "tune.max_steps=1", f"tune.seed={seed}")
    both = ("prompt.kind=deep", f"prompt.init_from=[{tmp_path / 'a'}, {tmp_path / 'b'}]")
    found = [started(tmp_path / "c", both[0], f"prompt.init_from=[{tmp_path / name}]") for name in "ab"]
    torch.testing.assert_close(started(tmp_path / "c", *both, "prompt.init=mean"), (found[0] + found[1]) / 2)


@pytest.mark.parametrize("architecture", ["Llama", "GPT-NeoX", "Cohere"])
@pytest.mark.parametrize("kind", ["deep", "soft"])
def test_concatenated_deep_prompts_hold_the_keys_that_the_base_computes_at_those_positions(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    """Deep prompts compiled from vectors, so that the base itself can read those vectors further on. Deep from deep and
    deep from soft alike; repeated beyond their own length too."""
    lm = lm_of(architecture)
    sources = []
    for name, seed, length in (("a", 0, 4), ("b", 1, 3)):
        run = tmp_path / name
        result = learn(run, "tune.max_steps=1", f"tune.seed={seed}", f"prompt.length={length}", lm=lm)
        sources.append(vectors(result))
        if kind == "deep":
            save_prompt(as_deep(lm, result.prompt), tmp_path / f"deep-{name}")
    folders = [tmp_path / (f"deep-{name}" if kind == "deep" else name) for name in "ab"]
    flags = [
        f"prompt.init_from=[{folders[0]}, {folders[1]}]",
        "prompt.kind=deep",
        "prompt.init=concatenation",
    ]
    for length in ("null", "9"):
        plan = make_plan(recipe(tmp_path / "c", *flags, f"prompt.length={length}"), lm=lm, splits=SPLITS)
        keys_LPHK, values_LPHK = start(plan)()
        first = 0
        for vectors_PD in [*sources, sources[0][:2]][: 2 if length == "null" else 3]:
            last = first + len(vectors_PD)
            cache = new_cache()
            lm.hidden(vectors_PD[None], positions_BS=torch.arange(first, last)[None], past=cache)
            for layer, (keys_PHK, values_PHK) in enumerate(zip(keys_LPHK, values_LPHK, strict=True)):
                theirs = cache.layers[layer]
                torch.testing.assert_close(
                    keys_PHK[first:last].transpose(0, 1), theirs.keys[0], atol=2e-5, rtol=1e-4
                )
                torch.testing.assert_close(
                    values_PHK[first:last].transpose(0, 1), theirs.values[0], atol=2e-5, rtol=1e-4
                )
            first = last
        assert keys_LPHK.shape[1] == first


def test_deep_prompts_are_not_concatenated_where_keys_cannot_be_turned(tmp_path: Path) -> None:
    lm = lm_of("GPT-2")
    for name in "ab":
        learn(tmp_path / name, "prompt.kind=deep", "tune.max_steps=1", lm=lm)
    both = ("prompt.kind=deep", f"prompt.init_from=[{tmp_path / 'a'}, {tmp_path / 'b'}]")
    with pytest.raises(RecipeError, match="no rotary positions by which"):
        started(tmp_path / "c", *both, "prompt.init=concatenation", lm=lm)


def test_deep_prompts_of_unlike_lengths_have_no_mean(tmp_path: Path) -> None:
    for name, length in (("a", 4), ("b", 3)):
        learn(tmp_path / name, "prompt.kind=deep", "tune.max_steps=1", f"prompt.length={length}")
    both = ("prompt.kind=deep", f"prompt.init_from=[{tmp_path / 'a'}, {tmp_path / 'b'}]")
    with pytest.raises(RecipeError, match="give prompts of one length"):
        started(tmp_path / "c", *both, "prompt.init=mean")


def test_a_soft_prompt_cannot_start_from_a_deep_one(tmp_path: Path) -> None:
    learn(tmp_path / "a", "prompt.kind=deep", "tune.max_steps=1")
    with pytest.raises(RecipeError, match="is a deep prompt, which has no vectors"):
        started(tmp_path / "c", f"prompt.init_from=[{tmp_path / 'a'}]")


@pytest.mark.usefixtures("learned")
def test_a_prompt_of_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongBase):
        started(tmp_path / "c", f"prompt.init_from=[{tmp_path / 'a'}]", lm=lm_of("GPT-2"))


def test_a_start_from_prompts_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"prompt\.init is mean, but prompt\.init_from is empty"):
        recipe(tmp_path, "prompt.init=mean")
