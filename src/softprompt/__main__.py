"""`python -m softprompt` is the command `softprompt`."""

from __future__ import annotations

import sys

from softprompt.cli.app import main

sys.exit(main())
