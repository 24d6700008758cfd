"""ChatGLM-6B in the terminal: ``python -m faster_chatglm_6b chat`` from a clone.

python examples/cli_demo.py                    # THUDM/chatglm-6b, about 12 GB to download once
python examples/cli_demo.py --tiny             # the tiny checkpoint of this repository: no download, no GPU
"""

import sys

from faster_chatglm_6b.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
