"""The part of a streamed answer that a client has, so that another engine can continue: nothing twice, nothing left out.

An engine that goes on sends the answer from its beginning. What the client has had already is compared and left out; where
it differs the stream must not go on, since its two halves would belong to two answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from softprompt.serving.answers import sse

DONE = "[DONE]"


class Differs(Exception):
    """Another engine gives another answer than the one that the client has had a part of."""


class Followed(Protocol):
    """One streamed answer over all engines that give parts of it."""

    is_done: bool

    def begin(self) -> None:
        """An engine begins to send the answer from its start."""

    def take(self, data: str) -> Iterator[bytes]:
        """One event of the engine; gives what the client has not had. Raises Differs, and Failed for an error's event."""

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as the next engine is asked it."""


class Failed(Exception):
    """An engine ended its stream with an error, which `record` holds in OpenAI's shape."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(str(record.get("message") or "an error without a message"))
        self.record = record


@dataclass
class _Choice:
    """Text and tokens of one choice: what the client has had, and how far the present engine has come."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    is_finished: bool = False
    has_role: bool = False
    read: int = 0
    ids_read: int = 0

    def new_text(self, piece: str) -> str:
        """The new part of the engine's next piece."""
        expected = self.text[self.read : self.read + len(piece)]
        if piece[: len(expected)] != expected:
            raise Differs
        self.read += len(piece)
        self.text += piece[len(expected) :]
        return piece[len(expected) :]

    def new_ids(self, ids: list[int]) -> list[int]:
        """The new part of the engine's next tokens."""
        expected = self.ids[self.ids_read : self.ids_read + len(ids)]
        if ids[: len(expected)] != expected:
            raise Differs
        self.ids_read += len(ids)
        self.ids += ids[len(expected) :]
        return ids[len(expected) :]

    def finish(self) -> bool:
        """The choice ends; says whether that is new. A shorter answer than the client has had is another one."""
        if self.read < len(self.text):
            raise Differs
        was, self.is_finished = self.is_finished, True
        return not was


class FollowedChoices:
    """Completions and chats. With tokens told, the next engine reads what there is in one go; without, it gives the whole
    answer again."""

    def __init__(self, model: str, choices: int, *, tells_ids: bool, rated: bool) -> None:
        self.model, self.tells_ids, self.rated = model, tells_ids, rated
        self.choices = [_Choice() for _ in range(choices)]
        self.is_done = False
        self._head: dict[str, Any] = {}

    def begin(self) -> None:
        """An engine begins to send the answer from its start."""
        for choice in self.choices:
            choice.read = choice.ids_read = 0

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request with the tokens that there are, but the last one: the engine chooses it again, and so sees the end
        that it may have been. Log-probabilities are of all tokens, so such an answer is given as a whole again."""
        body = {**body, "return_token_ids": True}
        if self.rated or not any(choice.ids for choice in self.choices):
            return body
        ours = dict(body.get("softprompt") or {})
        return {**body, "softprompt": {**ours, "begun": [choice.ids[:-1] for choice in self.choices]}}

    def take(self, data: str) -> Iterator[bytes]:
        """One event of the engine; gives what the client has not had."""
        if data == DONE:
            self.is_done = True
            yield sse(DONE)
            return
        record = json.loads(data)
        if "error" in record:
            raise Failed(record["error"])
        record["model"] = self.model
        self._head = self._head or {name: record[name] for name in ("id", "created") if name in record}
        record.update(self._head)
        if not record["choices"]:
            yield sse(record)
            return
        for choice in record["choices"]:
            followed = self.choices[choice["index"]]
            ids = followed.new_ids(choice.pop("token_ids", []))
            if self.tells_ids:
                choice["token_ids"] = ids
            is_end = choice["finish_reason"] is not None
            delta = choice.get("delta")
            words = choice if delta is None else delta
            key = "text" if delta is None else "content"
            if delta is not None and "role" in delta:
                if followed.has_role:
                    continue
                followed.has_role = True
            elif is_end:
                if not followed.finish():
                    continue
            else:
                words[key] = followed.new_text(words[key])
                if not words[key] and not (self.tells_ids and ids):
                    continue
            yield sse({**record, "choices": [choice]})


class FollowedColumns:
    """A comparison: a column for each model. Another engine gives the columns again from their start."""

    def __init__(self, columns: int) -> None:
        self.columns = [_Choice() for _ in range(columns)]
        self.is_done = False

    def begin(self) -> None:
        """An engine begins to send the answers from their start."""
        for column in self.columns:
            column.read = 0

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as it is."""
        return body

    def take(self, data: str) -> Iterator[bytes]:
        """One event of the engine; gives what the client has not had."""
        if data == DONE:
            self.is_done = True
            yield sse(DONE)
            return
        record = json.loads(data)
        column = self.columns[record["column"]]
        if "text" in record:
            record["text"] = column.new_text(record["text"])
            if record["text"]:
                yield sse(record)
        elif "error" in record:
            if record["error"].get("type") == "server_error":
                raise Failed(record["error"])
            if not column.is_finished:
                column.is_finished = True
                yield sse(record)
        elif column.finish():
            yield sse(record)


class FollowedResponse:
    """OpenAI's responses: one message; its ids and numbers are those of the first engine."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.message = _Choice()
        self.is_done = False
        self._ids: dict[str, str] = {}
        self._seen: set[str] = set()
        self._number = -1

    def begin(self) -> None:
        """An engine begins to send the answer from its start."""
        self.message.read = 0

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as it is."""
        return body

    def take(self, data: str) -> Iterator[bytes]:
        """One event of the engine; gives what the client has not had."""
        record = json.loads(data)
        kind = record["type"]
        if kind == "error":
            raise Failed({name: record.get(name) for name in ("code", "message", "param")})
        if kind == "response.output_text.delta":
            record["delta"] = self.message.new_text(record["delta"])
            if not record["delta"]:
                return
        elif kind in self._seen:
            return
        else:
            if kind == "response.output_text.done" and record["text"] != self.message.text:
                raise Differs
            self._seen.add(kind)
        self._number += 1
        record["sequence_number"] = self._number
        record = self._with_first_ids(record)
        self.is_done = kind in ("response.completed", "response.incomplete")
        yield sse(record, kind)

    def _with_first_ids(self, record: dict[str, Any]) -> dict[str, Any]:
        response, item = record.get("response"), record.get("item")
        if isinstance(response, dict):
            items = [self._first("message", output) for output in response["output"]]
            record["response"] = {
                **self._first("response", response),
                "model": self.model,
                "output": items,
            }
        if isinstance(item, dict):
            record["item"] = self._first("message", item)
        if "item_id" in record:
            record["item_id"] = self._ids.setdefault("message", record["item_id"])
        return record

    def _first(self, what: str, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "id": self._ids.setdefault(what, record["id"])}
