"""Records the commands of the README in a terminal, as docs/pictures/terminal.svg. Run from the repository's root:

    python docs/pictures/record_terminal.py

The commands run for real; what is printed is what is drawn.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent.parent
COLUMNS = 96


def main() -> None:
    (block,) = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        for line in block.splitlines():
            shown = line.replace(" --target", " \\\n    --target").replace(
                " --side-by-side", " \\\n    --side-by-side"
            )
            console.print(Text(f"$ {shown}", style="bold"))
            console.print(Text.from_ansi(run(line, folder)))
    no_remote_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(
        str(ROOT / "docs" / "pictures" / "terminal.svg"),
        title="softprompt",
        code_format=no_remote_fonts,
        unique_id="terminal",
    )


def run(command: str, folder: str) -> str:
    """What a command prints, as a terminal without a cursor shows it."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    program = f"{sys.executable} -m {command}"
    done = subprocess.run(
        program,
        shell=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in done.stdout.decode().split("\n")]
    return "\n".join(line for line in lines if "\x1b[1A" not in line).strip("\n") + "\n"


if __name__ == "__main__":
    main()
