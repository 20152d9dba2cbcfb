"""`python -m wanloom`: the same as the `wanloom` command."""

import sys

from wanloom.cli import main

sys.exit(main())
