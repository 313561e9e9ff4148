"""Everything that reads what strangers may have written, each as a function of bytes, for tests/test_fuzz.py and `make fuzz`.

A reader takes the bytes or refuses them with an error of ours, in a short message. `SEEDS` are right inputs of each, to
be changed a little.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import functools
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.errors import MAX_MESSAGE, SoftPromptError
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.report.curves import read_curves
from softprompt.report.pages import page
from softprompt.report.read import read_runs
from softprompt.report.render import as_html
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.library import Library
from softprompt.tuning.recipe import Recipe

RECORDS = Path(__file__).parent / "records_0_1"
Reader = Callable[[bytes], object]

ROWS = [
    {"text": "the parcel is late", "label": "delivery"},
    {"text": 'she said "no",\n twice\u2028', "label": "refund"},
    {"text": "ünï 😀", "label": 1.50},
]
CHAT = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}]


def refused_or_read(name: str, content: bytes) -> bool:
    """Whether the reader takes the bytes; its refusals are errors of ours with a short message."""
    try:
        READERS[name](content)
    except SoftPromptError as error:
        message = str(error)
        if not 0 < len(message) <= MAX_MESSAGE:
            raise AssertionError(
                f"{name}: a message of {len(message)} characters: {message[:200]} ..."
            ) from None
        return False
    return True


def _rows(suffix: str) -> Reader:
    def read(content: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"rows{suffix}"
            path.write_bytes(content)
            return list(load_splits(path, validation=0).train)

    return read


@functools.cache
def _prompt_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        prompt = SoftPrompt(
            torch.ones(2, 4), Fingerprint("tiny/base", width=4, layers=2), "{soft:2}{text}", name="greet"
        )
        save_prompt(prompt, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _prompt_file(name: str) -> Reader:
    def read(content: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            for other, former in _prompt_files().items():
                (Path(folder) / other).write_bytes(content if other == name else former)
            return repr(load_prompt(folder))

    return read


def _record(run: str, name: str) -> Reader:
    def read(content: bytes) -> object:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(RECORDS / run, Path(parent) / "run"))
            (folder / name).write_bytes(content)
            if name == "metrics.jsonl":
                read_curves(folder)
            return as_html([page(each, number) for number, each in enumerate(read_runs([folder]), 1)])

    return read


def _recipe(content: bytes) -> object:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        return Recipe.load(file.name)


def _keys(content: bytes) -> object:
    from softprompt.serving.keys import Keys

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        return Keys.load(file.name)


def _library(content: bytes) -> object:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.json").write_bytes(content)
        return Library(folder).entries()


def _template(content: bytes) -> object:
    return Template.parse(content.decode("utf-8", "surrogateescape"), target="label", length=4)


@functools.cache
def _served() -> Any:
    """The web application over a tiny base, with one engine for the life of the process."""
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.serving.app import build_app
    from softprompt.serving.catalogue import Catalogue
    from softprompt.serving.local_engine import LocalEngine
    from tiny_models import tiny_model, tiny_tokenizer

    tokenizer = copy.deepcopy(tiny_tokenizer())  # the cached one is every test's
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    engine = LocalEngine(FrozenLM.wrap(tiny_model("Llama"), tokenizer, "tiny"), max_rows=2)
    atexit.register(engine.__exit__, None, None, None)
    engine.__enter__()
    return build_app(engine, Catalogue(engine))


def _request(path: str) -> Reader:
    def read(content: bytes) -> object:
        status, body = asyncio.run(_posted(_served(), path, content))
        assert status < 500 or status == 503, (status, body[:300])
        if status >= 400:
            message = json.loads(body)["error"]["message"]
            raise SoftPromptError(message)
        return body

    return read


async def _posted(app: Any, path: str, content: bytes) -> tuple[int, bytes]:
    """One POST, without a network."""
    sent = [{"type": "http.request", "body": content, "more_body": False}]
    status, body = 0, b""
    answered = asyncio.Event()

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, body
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            body += message.get("body", b"")
            if not message.get("more_body"):
                answered.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
    }
    await app(scope, receive, send)
    return status, body


READERS: dict[str, Reader] = {
    "rows in csv": _rows(".csv"),
    "rows in tsv": _rows(".tsv"),
    "rows in json": _rows(".json"),
    "rows in jsonl": _rows(".jsonl"),
    "rows in jsonl.gz": _rows(".jsonl.gz"),
    "rows in parquet": _rows(".parquet"),
    "softprompt.json": _prompt_file("softprompt.json"),
    "adapter_config.json": _prompt_file("adapter_config.json"),
    "adapter_model.safetensors": _prompt_file("adapter_model.safetensors"),
    "recipes": _recipe,
    "templates": _template,
    "keys of a server": _keys,
    "index of a library": _library,
    "evaluation.json": _record("judged", "evaluation.json"),
    "rows.jsonl": _record("judged", "rows.jsonl"),
    "comparison.json": _record("compared", "comparison.json"),
    "metrics.jsonl": _record("tuned", "metrics.jsonl"),
    "requests for completions": _request("/v1/completions"),
    "requests for chat": _request("/v1/chat/completions"),
    "requests for scores": _request("/v1/softprompt/score"),
    "requests for tokens": _request("/tokenize"),
    "requests for texts": _request("/detokenize"),
}


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Right inputs of every reader."""
    delimited = 'text{0}label\nthe parcel is late{0}delivery\n"said ""no"", twice"{0}refund\n'
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    chat = "".join(json.dumps(row) + "\n" for row in CHAT).encode()
    files = _prompt_files()
    completion = {
        "model": "base",
        "prompt": "hello",
        "max_tokens": 2,
        "stop": ["x"],
        "logprobs": 2,
        "seed": 1,
    }
    turns = {
        "model": "base",
        "messages": CHAT[0]["messages"][:1],
        "max_tokens": 2,
        "top_p": 0.5,
        "temperature": 1,
    }
    key = {"name": "team", "sha256": "0" * 64, "models": ["*"], "rows": 3}
    version = {
        "digest": "0" * 64, "base": "b", "kind": "soft", "virtual_tokens": 4, "bytes": 9, "published": "2026-01-01",
    }  # fmt: skip
    return {
        "rows in csv": [delimited.format(",").encode(), delimited.format(";").encode("utf-16")],
        "rows in tsv": [delimited.format("\t").encode()],
        "rows in json": [json.dumps(ROWS).encode(), json.dumps({"data": ROWS}).encode()],
        "rows in jsonl": [lines, chat],
        "rows in jsonl.gz": [gzip.compress(lines, mtime=0)],
        "rows in parquet": [_parquet()],
        "softprompt.json": [files["softprompt.json"]],
        "adapter_config.json": [files["adapter_config.json"]],
        "adapter_model.safetensors": [files["adapter_model.safetensors"]],
        "recipes": [b"base: builtin\ndata:\n  source: rows.csv\n  column: text\ntune: {seed: 1, learning_rate: 1e-2}\n"],
        "templates": [b"{soft:4}{text}\nKind: {label}", b"{{{soft:2}}} {text} {soft:2}{label} ###"],
        "keys of a server": [f"- {json.dumps(key)}\n".encode()],
        "index of a library": [
            json.dumps({"schema_version": 1, "names": {"a": {"current": 1, "versions": {"1": version}}}}).encode()
        ],
        "evaluation.json": [(RECORDS / "judged" / "evaluation.json").read_bytes()],
        "rows.jsonl": [(RECORDS / "judged" / "rows.jsonl").read_bytes()],
        "comparison.json": [(RECORDS / "compared" / "comparison.json").read_bytes()],
        "metrics.jsonl": [(RECORDS / "tuned" / "metrics.jsonl").read_bytes()],
        "requests for completions": [json.dumps(completion).encode()],
        "requests for chat": [json.dumps(turns).encode()],
        "requests for scores": [json.dumps({"models": ["base"], "input": "a", "continuations": ["b"]}).encode()],
        "requests for tokens": [b'{"model": "base", "prompt": "hello"}'],
        "requests for texts": [b'{"model": "base", "tokens": [5, 6, 7]}'],
    }  # fmt: skip


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    columns = {name: [str(row[name]) for row in ROWS] for name in ROWS[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()
