"""One turn and a follow-up with ChatGLM-6B: ``python -m faster_chatglm_6b demo`` from a clone.

python examples/demo.py                             # the tiny checkpoint of this repository: no download, no GPU
python examples/demo.py --model THUDM/chatglm-6b    # about 12 GB to download once
"""

import sys

from faster_chatglm_6b.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
