"""Whatever bytes a stranger wrote, every reader takes them or refuses them in a short message.

A bounded number of inputs a reader here; `make fuzz` tries many more (SOFTPROMPT_FUZZ_INPUTS), and fuzz_atheris.py
follows what the code has not yet executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from readers import READERS, refused_or_read, seeds

INPUTS = int(os.environ.get("SOFTPROMPT_FUZZ_INPUTS", "40"))

PIECES = st.sampled_from(
    [
        *b'{} [] , : " \\ \n \r \t \x00 0 - . e < & * ! # \''.split(b" "), b" ", b"null", b"true", b"NaN", b"Infinity",
        b"-1", b"0.5", b"1e999", b"9" * 30, b"9" * 5000, b"[" * 5000, b'{"a":' * 2000, b"\\ud800", b"\xff", b"\xfe\xff",
        b"\xef\xbb\xbf", "\u2028".encode(), "\u0085".encode(), b"\x1b[31m", b"</script>", b"[/red]", b"../../x", b"/dev/zero",
        b"\x1f\x8b", b"PAR1", b"{soft:", b"{soft:99999999999}", b"{messages}", b"{label}", b"&a [*a]", b"!!python/name:os ",
        b'"text"', b'"label"', b'"messages"', b'"role"', b'"schema"', b'"format"', b"\xf0\x9f\x98\x80",
    ]
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """A right input of a reader in which stretches were cut, doubled or replaced; or any bytes at all."""
    if draw(st.integers(0, 7)) == 0:
        return draw(st.lists(PIECES | st.binary(max_size=6), max_size=20).map(b"".join))
    content = bytearray(draw(st.sampled_from(seeds()[name])))
    for _ in range(draw(st.integers(0, 4))):
        first = draw(st.integers(0, len(content)))
        last = min(len(content), first + draw(st.sampled_from([0, 0, 1, 1, 2, 5, 20, 1000])))
        content[first:last] = draw(PIECES | st.binary(max_size=4) | st.just(bytes(content[first:last]) * 2))
    return bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_right_inputs_are_read(name: str) -> None:
    assert all(refused_or_read(name, content) for content in seeds()[name])


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused_in_a_short_message(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    tried = 0

    @settings(
        max_examples=INPUTS,
        deadline=None,
        database=None,
        derandomize="SOFTPROMPT_FUZZ_INPUTS" not in os.environ,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    @given(changed(name))
    def try_one(content: bytes) -> None:
        nonlocal tried
        refused_or_read(name, content)
        tried += 1

    try_one()
    record_property("cases", tried)
