"""The public door: every name is there, typed for checkers, lazily loaded; and the examples of the issue work in Python."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import softprompt

ROOT = Path(__file__).resolve().parent.parent
GOOD = """
import softprompt
from typing_extensions import assert_type

lm = softprompt.FrozenLM.load("builtin", device="cpu")
assert_type(lm, softprompt.FrozenLM)
recipe = softprompt.Recipe(
    data=softprompt.Data(source="builtin:roles", column="prompt", limit=64), out="runs/x"
)
assert_type(softprompt.tune(recipe, lm=lm), softprompt.TuneResult)
prompt = softprompt.load_prompt("runs/x", base=lm.fingerprint)
assert_type(softprompt.generate(lm, "a text", prompt), list[softprompt.Generation])
assert_type(softprompt.generate(lm, ["a", "b"], "runs/x", softprompt.DecodeSettings(max_new_tokens=5)), list[softprompt.Generation])
assert_type(softprompt.score(lm, "a text", " more", softprompt.TextPrompt("Be kind. ")), list[softprompt.Scored])
assert_type(softprompt.evaluate(prompt), softprompt.Evaluation)
assert_type(softprompt.preview(recipe), softprompt.Preview)
assert_type(softprompt.SoftPrompt.from_pretrained("runs/x"), softprompt.SoftPrompt)
assert_type(softprompt.compare(recipe), softprompt.Comparison)
assert_type(softprompt.__version__, str)
try:
    softprompt.tune(recipe)
except softprompt.SoftPromptError as error:
    print(error)
"""
BAD = {
    'softprompt.FrozenLM.load("builtin", devise="cpu")': "devise",
    'softprompt.Recipe(data=softprompt.Data(source="x"), tunee=3)': "tunee",
    "softprompt.Data(source=5)": "int",
    "softprompt.tun": "tun",
    'softprompt.DecodeSettings(max_new_tokens="many")': "str",
    "softprompt.generate(softprompt.Recipe, 'a')": "Recipe",
}


def names_in(path: Path) -> set[str]:
    """Names that a module imports for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    return {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_every_public_name_is_there_and_no_other() -> None:
    for name in softprompt.__all__:
        assert getattr(softprompt, name) is not None, name
    typed = names_in(ROOT / "src" / "softprompt" / "__init__.py")
    assert {*typed, "__version__"} == set(softprompt.__all__)
    assert dir(softprompt) == sorted(softprompt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tun'"):
        softprompt.tun  # type: ignore[attr-defined]  # noqa: B018


def test_importing_loads_no_torch() -> None:
    code = "import softprompt, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_verb_is_a_function_and_no_module() -> None:
    for verb in (
        "tune",
        "evaluate",
        "compare",
        "sweep",
        "generate",
        "score",
        "preview",
        "distil",
        "load_prompt",
    ):
        assert callable(getattr(softprompt, verb)), verb


def test_no_public_object_dumps_tensors_or_rows_when_it_is_printed() -> None:
    """A repr is for a terminal: a line or two, whatever the object holds."""
    lm = softprompt.FrozenLM.load("builtin", device="cpu")
    length = 4
    vectors = lm.embedding_VD[:length].float().clone()
    prompt = softprompt.SoftPrompt(vectors, lm.fingerprint, name="p", template="{soft:4}{text}")
    recipe = softprompt.Recipe(data=softprompt.Data(source="builtin:messages", target="label", limit=40))
    settings = softprompt.DecodeSettings(max_new_tokens=3)
    conversation = softprompt.Conversation(lm, prompt)
    conversation.say("hello", settings)
    compiled = softprompt.compile_prompt(lm, prompt)
    printed = {
        "lm": lm,
        "loss": softprompt.FastLoss(lm),
        "prompt": prompt,
        "compiled": compiled,
        "state": compiled.state,
        "preview": softprompt.preview(recipe),
        "splits": softprompt.load_splits("builtin:messages"),
        "generation": softprompt.generate(lm, "a text", prompt, settings)[0],
        "scored": softprompt.score(lm, "a text", " more", prompt)[0],
        "conversation": conversation,
    }
    lengths = {name: len(repr(thing)) for name, thing in printed.items()}
    assert max(lengths.values()) < 400, lengths
    assert not any("tensor(" in repr(thing) or " object at 0x" in repr(thing) for thing in printed.values())


def checked(tool: list[str], tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [*tool, str(script)], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


MYPY = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]


def test_mypy_sees_the_types_of_a_users_script(tmp_path: Path) -> None:
    done = checked(MYPY, tmp_path, GOOD)
    assert done.returncode == 0, done.stdout


def test_mypy_sees_what_is_wrong_in_a_users_script(tmp_path: Path) -> None:
    done = checked(MYPY, tmp_path, "import softprompt\n" + "\n".join(BAD) + "\n")
    assert done.returncode == 1
    for line, words in enumerate(BAD.values(), start=2):
        faults = [fault for fault in done.stdout.splitlines() if f"script.py:{line}:" in fault]
        assert any(words in fault for fault in faults), (line, words, done.stdout)


@pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None, reason="needs basedpyright (pip install)"
)
def test_pyright_sees_the_same(tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable]
    good = checked(tool, tmp_path, GOOD)
    assert good.returncode == 0, good.stdout
    bad = checked(tool, tmp_path, "import softprompt\n" + "\n".join(BAD) + "\n")
    for line in range(2, 2 + len(BAD)):
        assert f"script.py:{line}:" in bad.stdout, (line, bad.stdout)
