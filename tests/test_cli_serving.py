"""The verbs around serving: publish, list, chat; and what serve refuses before it loads anything."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.cli.chat import Chat
from softprompt.data.example import Example, Message
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_serving import prompt_of
from test_serving_api import CHAT_TEMPLATE
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


def test_a_prompt_is_published_listed_and_rolled_back(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        save_prompt(prompt_of(lm, seed, "mine"), tmp_path / "mine")
        assert main(["publish", "mine", "support", "--library", "shelf"]) == 0
    assert main(["publish", "support@1", "--switch", "--library", "shelf"]) == 0
    capsys.readouterr()
    assert main(["list", "shelf", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["version"], entry["current"]) for entry in listed] == [
        ("support", 1, True),
        ("support", 2, False),
    ]
    assert main(["list", "nowhere"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["publish", "nowhere", "x", "--library", "shelf"]) == 5


def test_serve_refuses_an_open_door_and_a_missing_prompt_or_library_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "--keys" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing")]) == 5
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["serve", "--library", str(tmp_path / "nothing")]) == 2
    assert "Check --library" in capsys.readouterr().err


def test_a_talk_switches_prompts_compares_and_is_saved(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = prompt_of(lm, 1, "greet")
    save_prompt(prompt, tmp_path / "greet")
    decode = DecodeSettings(max_new_tokens=6)
    lines = [
        "hello",
        f"/prompt {tmp_path / 'greet'}",
        "hello",
        "/compare",
        "hello",
        "/nonsense",
        f"/save {tmp_path / 'talk.txt'}",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    chat = Chat(lm, None, decode)
    chat.run()
    (bare,), (learned,) = (generate(lm, ["hello"], one, decode) for one in (None, prompt))
    assert [(each.name, each.answer) for each in chat.exchanges] == [
        ("base", bare.text.strip()),
        ("greet", learned.text.strip()),
        ("greet", learned.text.strip()),
        ("base", bare.text.strip()),
    ]
    assert "there is no such command" in capsys.readouterr().out
    assert (tmp_path / "talk.txt").read_text(encoding="utf-8").count("you: hello") == 4
    with pytest.raises(ValueError, match="exists already"):
        chat.save(str(tmp_path / "talk.txt"))


def test_versions_of_a_name_are_told_apart_in_a_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is given the other's answers as its own former turns."""
    tokenizer = copy.deepcopy(tiny_tokenizer())  # the cached one is every test's
    tokenizer.chat_template = CHAT_TEMPLATE
    lm = FrozenLM.wrap(tiny_model("Llama"), tokenizer, "chatting")
    library = Library(tmp_path / "shelf")
    for seed in (1, 2):
        save_prompt(prompt_of(lm, seed, "talk", "{soft:4}{messages}"), tmp_path / "talk")
        library.publish(tmp_path / "talk", "talk")
    lines = [
        f"/prompt {tmp_path / 'shelf' / 'talk@1'}",
        "hello",
        f"/prompt {tmp_path / 'shelf' / 'talk@2'}",
        "you",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    decode = DecodeSettings(max_new_tokens=6)
    chat = Chat(lm, None, decode)
    chat.run()
    assert [each.name for each in chat.exchanges] == ["talk@1", "talk@2"]
    second = prompt_of(lm, 2, "talk", "{soft:4}{messages}")
    (fresh,) = generate(lm, [Example({}, (Message("user", "you"),))], second, decode)
    assert chat.exchanges[1].answer == fresh.text.strip()


def test_a_server_on_the_command_line_answers_and_ends_in_order(lm: FrozenLM, tmp_path: Path) -> None:
    """The whole of `softprompt serve` in a process of its own, stopped by SIGTERM."""
    import signal
    import socket
    import time

    import httpx2 as httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "softprompt", "serve", "--base", "builtin", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        answer = None
        for _ in range(600):
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).json()
                break
            except httpx.TransportError:
                assert server.poll() is None, server.stderr and server.stderr.read()
                time.sleep(0.1)
        assert answer is not None
        assert [model["id"] for model in answer["data"]] == ["base"]
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert server.returncode == 0
