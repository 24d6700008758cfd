"""Save a tokenizer so that an interruption leaves the old files or the new ones, never a part of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..disk.replacing import replaced_file, saved_beside


class SavingMixin:
    """``save_pretrained`` and ``save_vocabulary`` that write beside the old files, then put the new ones in place."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Save as ``PreTrainedTokenizer.save_pretrained`` does; an interruption leaves the old files as they were."""
        folder = Path(save_directory)
        # A repository of the hub is named after the directory, and transformers refuses a file.
        if push_to_hub or folder.is_file():
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        with saved_beside(str(folder), removes_old=False) as beside:
            written = super().save_pretrained(beside, *args, **kwargs)
        return tuple(str(folder / Path(path).relative_to(beside)) for path in written or ())

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write ice_text.model into ``save_directory`` or, if that is no directory, to that very path.

        The content is the loaded one, even if the original file is gone.

        Returns:
            the path written.
        """
        path = Path(save_directory)
        if path.is_dir():
            path = path / "-".join(filter(None, (filename_prefix, self.vocab_files_names["vocab_file"])))
        with replaced_file(path) as beside:
            Path(beside).write_bytes(self.sp_tokenizer.model.serialized_model_proto())
        return (str(path),)
