"""Every setting is declared once; what a person writes is taken as meant, or refused with its place."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import settings as searching
from hypothesis import strategies as st
from pydantic import ValidationError

from softprompt.errors import RecipeError
from softprompt.settings.explain import explain
from softprompt.settings.section import Section, setting, settings
from softprompt.settings.sources import merge_file, put
from softprompt.settings.table import Table, fill
from softprompt.settings.text import scalar
from softprompt.tuning.recipe import Recipe

MINIMAL = "data:\n  source: rows.csv\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(written(folder, text), overrides)
    return str(caught.value).replace(str(folder) + "/", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-3", 0.005),
        ("1e-4", 0.0001),
        (".5", 0.5),
        ("3", 3.0),
        ("1_000", 1000.0),
        ("+2.", 2.0),
        ("1E2", 100.0),
    ],
)
def test_a_learning_rate_may_be_written_as_people_write_numbers(
    tmp_path: Path, text: str, value: float
) -> None:
    recipe = Recipe.load(written(tmp_path, MINIMAL + f"tune:\n  learning_rate: {text}\n"))
    assert recipe.tune.learning_rate == value
    assert Recipe.from_flags({"--data": "rows.csv", "--learning-rate": text}).tune.learning_rate == value


def test_words_that_other_yaml_readers_bend_stay_words() -> None:
    assert [scalar(word) for word in ("no", "on", "yes", "12:30:00", "2024-01-01", "auto")] == [
        "no",
        "on",
        "yes",
        "12:30:00",
        "2024-01-01",
        "auto",
    ]
    assert [scalar(word) for word in ("true", "False", "null", "~", "")] == [True, False, None, None, None]


def test_an_unknown_key_is_refused_with_its_line_and_the_key_that_was_meant(tmp_path: Path) -> None:
    text = MINIMAL + "tune:\n  epochs: 3\n  learning_rte: 5e-3\n"
    assert refusal(tmp_path, text) == (
        "recipe.yaml:5: tune.learning_rte: unknown setting. Did you mean tune.learning_rate?"
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("learning_rate: 5e-3", "tune.learning_rate"),
        ("lr: 5e-3", "tune.learning_rate"),
        ("model: gpt2", "base"),
        ("prompt: {lenght: 4}", "prompt.length"),
        ("bsae: gpt2", "base"),
    ],
)
def test_a_key_in_the_wrong_place_is_shown_its_right_one(tmp_path: Path, text: str, meant: str) -> None:
    assert f"Did you mean {meant}?" in refusal(tmp_path, MINIMAL + text + "\n")


def test_a_key_without_a_likeness_points_at_the_list(tmp_path: Path) -> None:
    assert "`softprompt recipe` lists them all" in refusal(tmp_path, MINIMAL + "zzzz: 1\n")


def test_a_value_of_the_wrong_kind_says_line_found_and_wanted(tmp_path: Path) -> None:
    assert refusal(tmp_path, MINIMAL + "tune:\n\n  epochs: many\n") == (
        "recipe.yaml:5: tune.epochs: found 'many' (text), wanted a whole number of at least 1."
    )
    assert refusal(tmp_path, MINIMAL + "tune: {learning_rate: -1}\n") == (
        "recipe.yaml:3: tune.learning_rate: found -1 (a number), wanted a number above 0, or one of auto, find."
    )
    assert refusal(tmp_path, MINIMAL + "  streaming: yes\n").endswith(
        "found 'yes' (text), wanted true or false."
    )
    assert "wanted settings such as tune.learning_rate" in refusal(tmp_path, MINIMAL + "tune: 5\n")
    assert refusal(tmp_path, MINIMAL + "tune: {learning_rate: .nan}\n").startswith(
        "recipe.yaml:3: tune.learning_rate"
    )


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    lines = refusal(tmp_path, MINIMAL + "tune: {epochs: no}\nfoo: 1\n").splitlines()
    assert [line.split(":")[1] for line in lines] == ["3", "4"]


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "base: a\nbase: b\n")
    assert message == "recipe.yaml:4: base is given twice (first at recipe.yaml:3). Keep one of them."


def test_text_that_is_no_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, MINIMAL + "tune: [1,\nout: x\n").startswith("recipe.yaml:")
    assert refusal(tmp_path, "- a\n- b\n").startswith("recipe.yaml:1: found a list")
    assert refusal(tmp_path, "").startswith(
        "recipe.yaml: data.source is missing. Use --data, or write it into the file: A file"
    )


def test_a_missing_recipe_file_is_named() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no such recipe file"):
        Recipe.load("nowhere.yaml")


def test_overrides_come_after_the_file_and_flags_after_them(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "tune: {epochs: 3, seed: 1}\n")
    assert Recipe.load(path, ["tune.epochs=4"]).tune.epochs == 4
    recipe = Recipe.from_flags({"--epochs": "5", "--seed": None}, ["tune.epochs=4"], path=path)
    assert (recipe.tune.epochs, recipe.tune.seed) == (5, 1)


def test_an_override_that_wants_text_takes_it_exactly_as_written() -> None:
    overrides = ["data.template={soft:20} {text} ", "data.revision=12345e67", "data.encoding=null"]
    recipe = Recipe.from_flags({"--data": "rows.csv"}, overrides)
    assert recipe.data.template == "{soft:20} {text} "
    assert recipe.data.revision == "12345e67"
    assert recipe.data.encoding == "null"


def test_a_mapping_may_be_set_whole_or_by_name() -> None:
    for override in ("data.fields={text: body}", "data.fields.text=body"):
        assert Recipe.from_flags({"--data": "x"}, [override]).data.fields == {"text": "body"}


def test_what_is_held_out_may_be_a_share_a_count_or_a_name() -> None:
    values = [
        Recipe.from_flags({"--data": "x"}, [f"data.validation={v}"]).data.validation
        for v in ("0.1", "50", "dev")
    ]
    assert values == [0.1, 50, "dev"]


@pytest.mark.parametrize("override", ["tune.epochs", "=3", "data=3", "a.b=3", "tune.epochs.x=3"])
def test_an_override_that_names_no_setting_is_refused_with_itself(override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        Recipe.from_flags({"--data": "x"}, [override])


def test_settings_that_contradict_each_other_are_refused() -> None:
    for override in ("prompt.init=text", "prompt.init=labels"):
        with pytest.raises(RecipeError, match=override.split("=")[0]):
            Recipe.from_flags({"--data": "x"}, [override])


def test_python_callers_get_the_same_refusals() -> None:
    with pytest.raises(RecipeError, match=r"data\.sorce: unknown setting. Did you mean data\.source"):
        Recipe(data={"source": "x", "sorce": "y"})


def test_a_recipe_written_out_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = Recipe.from_flags(
        {"--data": "5e-3", "--learning-rate": "1e-5", "--batch-size": "auto"},
        ["data.template=Tweet: {text}\\n# {label}: ", "data.target=label", "data.fields.text=Tweet text"],
    )
    assert Recipe.load(written(tmp_path, recipe.to_yaml())) == recipe


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029\r"), min_size=1))
def test_any_text_survives_being_written_and_read(text: str) -> None:
    import tempfile

    recipe = Recipe(data={"source": text, "template": text})
    with tempfile.TemporaryDirectory() as folder:
        assert Recipe.load(written(Path(folder), recipe.to_yaml())) == recipe


def test_every_setting_has_a_help_text_and_a_default_that_it_accepts() -> None:
    for each in settings(Recipe):
        assert each.help.endswith("."), each.path
        if not each.required and each.default not in (None, {}):
            Recipe.from_flags({"--data": "x"}, [f"{each.path}={each.default}".replace("=False", "=false")])
    flags = [each.flag for each in settings(Recipe) if each.flag]
    assert len(flags) == len(set(flags))


def test_the_flags_that_people_try_first_are_there() -> None:
    paths = {name: each.path for each in settings(Recipe) for name in (each.flag, *each.aliases)}
    wanted = {
        "--base": "base",
        "--data": "data.source",
        "--target": "data.target",
        "--template": "data.template",
        "--validation": "data.validation",
        "--kind": "prompt.kind",
        "--virtual-tokens": "prompt.length",
        "--length": "prompt.length",
        "--steps": "tune.max_steps",
        "--dtype": "dtype",
        "--device": "device",
        "--trust-remote-code": "trust_remote_code",
    }
    assert {name: paths.get(name) for name in wanted} == wanted


class Listening(Table):
    stop: tuple[str, ...] = setting((), "Texts.", flag="--stop")
    arms: list[Literal["base", "soft"]] = setting([], "Words.", flag="--arms")
    rates: dict[str, float] = setting({}, "Numbers by name.", flag="--rate")
    loud: bool = setting(False, "Yes or no.", flag="--loud")
    seed: int = setting(0, "A number.", flag="--seed", le=9)


class Cooking(Table):
    seed: int = setting(0, "A number.", flag="--seed", le=9)
    dish: str = setting("soup", "A text.")


def test_one_file_and_one_set_of_flags_fill_all_tables_of_a_verb(tmp_path: Path) -> None:
    path = written(tmp_path, "stop: ['a,b']\nseed: 3\ndish: 1e5\n")
    listening, cooking = fill(
        (Listening, Cooking), {"--arms": ["base,soft"], "--rate": ["lora=1e-3"], "--loud": True}, path=path
    )
    assert listening == Listening(
        stop=("a,b",), arms=["base", "soft"], rates={"lora": 0.001}, loud=True, seed=3
    )
    assert cooking == Cooking(seed=3, dish="1e5")
    listening, _ = fill(
        (Listening, Cooking), {"--stop": ["x,y", "z"], "--seed": "4", "--loud": False}, path=path
    )
    assert listening == Listening(stop=("x,y", "z"), seed=4)


def test_what_any_of_a_verbs_tables_refuses_is_said_once_with_flag_or_line(tmp_path: Path) -> None:
    path = written(tmp_path, "dsh: soup\nseed: 12\n")
    with pytest.raises(RecipeError) as caught:
        fill((Listening, Cooking), {"--arms": ["base,sfot"], "--rate": ["lora=fast"]}, path=path)
    assert str(caught.value).replace(f"{tmp_path}/", "").splitlines() == [
        "--arms: found 'sfot' (text), wanted a list: one of base, soft.",
        "--rate: rates: found 'fast' (text), wanted a mapping of names to numbers.",
        "recipe.yaml:1: dsh: unknown setting. Did you mean dish?",
        "recipe.yaml:2: seed: found 12 (a number), wanted a whole number of at most 9.",
    ]


def test_a_file_alone_cannot_let_a_bases_own_code_run(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "trust_remote_code: true\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: trust_remote_code .*pass --trust-remote-code"):
        Recipe.load(path)
    assert Recipe.load(path, ["trust_remote_code=true"]).trust_remote_code
    assert Recipe.from_flags({"--trust-remote-code": True}, path=path).trust_remote_code
    assert not Recipe.from_flags({"--trust-remote-code": False}, path=path).trust_remote_code


class Oven(Section):
    degrees: int = setting(180, "How hot.", elsewhere="temperature", le=250)


class Baking(Section):
    oven: Oven = Oven()


def test_another_table_of_settings_is_filled_and_explained_by_its_own_names(tmp_path: Path) -> None:
    tree: dict[str, object] = {}
    places: dict[str, str] = {}
    merge_file(Baking, tree, places, written(tmp_path, "oven: {degrees: 200}\n"))
    assert Baking.model_validate(tree).oven.degrees == 200
    with pytest.raises(RecipeError, match=r"Did you mean oven\.degrees\?"):
        put(Baking, tree, places, "temperature", "210", "--set temperature")
    put(Baking, tree, places, "oven.degrees", "300", "--set oven.degrees")
    with pytest.raises(ValidationError) as caught:
        Baking.model_validate(tree)
    message = explain(Baking, caught.value, places, "baking")
    assert message == "--set oven.degrees: found 300 (a number), wanted a whole number of at most 250."


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, softprompt, softprompt.tuning.recipe, softprompt.progress.events; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- hostile text ------------------------------------------------------------------------------------------------

NESTED = "data: " + "[" * 100_000
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NESTED, "nested more than 20 deep"),
        ("{a: " * 100_000, "nested more than 20 deep"),
        ("- " * 100_000 + "x", "nested more than 20 deep"),
        (BOMB, "found more than 10,000 values, aliases opened"),
        ("a: &a [*a]\n", "nested more than 20 deep"),
        ("tune: {seed: " + "9" * 5000 + "}\n" + MINIMAL, "wanted a whole number of at least 0"),
        ("tune: {seed: 18446744073709551616}\n" + MINIMAL, "wanted at most 9007199254740991"),
        (
            "prompt: {length: 100000000}\n" + MINIMAL,
            "wanted a whole number of at least 1 and of at most 100000",
        ),
        ("tune: {batch_size: 1e400}\n" + MINIMAL, "tune.batch_size"),
        ("x" * 2_000_000, "wanted a recipe of at most 1,000,000"),
        ("\x00", "not YAML"),
    ],
    ids=range(11),
)
def test_a_hostile_recipe_is_refused_in_a_short_line_without_memory_or_time(
    tmp_path: Path, text: str, said: str
) -> None:
    tracemalloc.start()
    try:
        message = refusal(tmp_path, text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said in message
    assert len(message) < 500
    assert peak < 60_000_000  # opened, the aliases alone would be 387 million values


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="found a device or a pipe"):
        Recipe.load(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="found a device or a pipe"):
        Recipe.load("/dev/zero")


FRAGMENTS = st.sampled_from(
    ["data", "source", "tune", "prompt", "seed", "length", ":", ": ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "&a ",
     "*a", "!!python/object:os.system ", "|\n", ">", "'", '"', "#", "1e5", "-1", "9" * 400, ".nan", "true", "~", "\t",
     "<<: ", "? ", "%YAML 1.1\n---\n", "\x00", "é", "\u2028"]
)  # fmt: skip


@searching(deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_is_a_recipe_or_is_refused_as_one(text: str) -> None:
    with contextlib.suppress(RecipeError):
        Recipe.load(_file_of(text))


@searching(deadline=None)
@given(st.sampled_from([each.path for each in settings(Recipe)]), st.text(max_size=12) | FRAGMENTS)
def test_any_text_is_a_settings_value_or_is_refused_with_the_setting(path: str, text: str) -> None:
    with contextlib.suppress(RecipeError):
        Recipe.from_flags({"--data": "x"}, [f"{path}={text}"])


def _file_of(text: str) -> Path:
    path = Path(tempfile.gettempdir()) / f"softprompt-fuzz-{os.getpid()}.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


class Renamed(Section):
    new_name: int = setting(1, "A setting that had another name.", flag="--new-name", was="old_name")
    other: int = setting(2, "Another one.")


class WithRenamed(Table):
    part: Renamed = Renamed()


def test_the_former_name_of_a_setting_is_read_from_a_file_from_set_and_from_python(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("part:\n  old_name: 5\n", encoding="utf-8")
    assert WithRenamed.load(path).part.new_name == 5
    assert WithRenamed.from_flags({}, ["part.old_name=6"]).part.new_name == 6
    assert WithRenamed.load(path, ["part.old_name=7"]).part.new_name == 7
    assert WithRenamed.load(path).changed(["part.old_name=8"]).part.new_name == 8
    assert WithRenamed(part={"old_name": 9}).part.new_name == 9  # type: ignore[arg-type]
    assert WithRenamed.load(path).to_yaml() == "part:\n  new_name: 5\n  other: 2\n"


def test_a_fault_under_a_former_name_is_told_with_its_line_and_the_name_of_today(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("part:\n  other: 3\n  old_name: many\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"old\.yaml:3: part\.new_name: found 'many' \(text\)"):
        WithRenamed.load(path)


def test_a_former_name_beside_the_one_of_today_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("part:\n  old_name: 5\n  new_name: 6\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="old_name is the former name of new_name, and both are set"):
        WithRenamed.load(path)


def test_a_recipe_of_version_0_1_turns_int8_products_on(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "records_0_1" / "tuned" / "recipe.yaml").read_text("utf-8")
    assert "  int8: false\n" in text
    recipe = Recipe.load(written(tmp_path, text.replace("  int8: false\n", "  int8: true\n")))
    assert recipe.tune.int8_products is True
    assert Recipe.load(written(tmp_path, text)).tune.int8_products is False
