"""``python -m faster_chatglm_6b`` prints the status report."""

from . import status

print(status())
