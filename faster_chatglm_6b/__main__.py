"""``python -m faster_chatglm_6b``: the commands of ``faster_chatglm_6b.cli``; without one, the status report."""

import sys

from .cli import main

sys.exit(main())
