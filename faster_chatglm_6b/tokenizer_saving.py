"""Saving a tokenizer so that an interruption leaves the old files or the new ones, never a part of one."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class SavingMixin:
    """`save_pretrained` and `save_vocabulary` that write beside the old files and put the new ones in their place."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """`PreTrainedTokenizer.save_pretrained`; interrupted, it leaves each file whole, and the old ones at first."""
        folder = Path(save_directory)
        if push_to_hub or folder.is_file():  # named after the directory, or refused by transformers
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
            written = super().save_pretrained(beside, *args, **kwargs)
            for path in sorted(Path(beside).rglob("*")):
                if path.is_file():
                    target = folder / path.relative_to(beside)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(path, target)
        return tuple(str(folder / Path(path).relative_to(beside)) for path in written or ())

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write ice_text.model into `save_directory` (or, if that is no directory, to that very path).

        The content is the loaded one, also where the original file is gone. Returns the path written.
        """
        path = Path(save_directory)
        if path.is_dir():
            path = path / "-".join(filter(None, (filename_prefix, self.vocab_files_names["vocab_file"])))
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_bytes(self.sp_tokenizer.model.serialized_model_proto())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return (str(path),)
