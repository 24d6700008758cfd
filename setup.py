"""What pyproject.toml cannot say: the tiny checkpoint in examples/ is packaged as faster_chatglm_6b/tiny_chatglm.

There is one copy of it, where the clone has it. Every other piece of metadata is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["faster_chatglm_6b*"]), "faster_chatglm_6b.tiny_chatglm"],
    package_dir={"faster_chatglm_6b.tiny_chatglm": "examples/tiny_chatglm"},
)
