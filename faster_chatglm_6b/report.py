"""Record what this process has served, patched and chosen, and report it as ``faster_chatglm_6b.status()``.

It imports neither torch nor transformers, so that every other file may record here what it does.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import backend, versions

Choices = dict[str, tuple[str, str]]

logger = logging.getLogger("faster_chatglm_6b")

_lock = threading.Lock()
_served: Counter[tuple[str, str]] = Counter()
_passed_through: dict[str, str] = {}
_operators: dict[str, Choices] = {}
_generations: Counter[tuple[str, str]] = Counter()
_notices: dict[str, None] = {}


def record_served(kind: str, name: str) -> None:
    """Note that the ``kind`` ("config", "tokenizer", "model") of checkpoint ``name`` (path or hub id) was served."""
    with _lock:
        _served[kind, name] += 1


def served_names() -> list[str]:
    """List the checkpoints, path or hub id, of which something was served."""
    with _lock:
        return list(dict.fromkeys(name for _, name in _served))


def record_passed_through(name: str, reason: str) -> bool:
    """Note that a related checkpoint was left to its own code; return True the first time for this name and reason."""
    with _lock:
        is_new = _passed_through.get(name) != reason
        _passed_through[name] = reason
        return is_new


def record_operators(device_dtype: str, choices: Mapping[str, tuple[str, str]]) -> None:
    """Note which implementation serves each operator: ``choices`` maps its name to (implementation, reason)."""
    with _lock:
        _operators[device_dtype] = dict(choices)


def record_generation(path: str, reason: str = "") -> None:
    """Count one generation on ``path``, "captured" (the captured loop) or "plain" (transformers' own), and why there.

    Raises:
        ValueError: ``path`` is neither.
    """
    if path not in ("captured", "plain"):
        raise ValueError(f"A generation takes the path 'captured' or 'plain', not {path!r}.")
    with _lock:
        _generations[path, reason] += 1


def record_notice(text: str) -> None:
    """Note, and log the first time, what makes generation other than expected: an unknown transformers, say."""
    with _lock:
        is_new = text not in _notices
        _notices[text] = None
    if is_new:
        logger.warning(text)


class Status(NamedTuple):
    """A snapshot of the library's state; ``print`` it for the report.

    Attributes:
        patched: what is changed in transformers, one line each.
        served: counts per (kind, checkpoint).
        passed_through: related checkpoints, each with the reason why its own code runs.
        operators: {"device dtype": {operator: (implementation, reason)}}.
        captured_generations, plain_generations: counts per reason.
        framework: lines about transformers, torch and OneFlow.
        notices: sentences about what was not expected, of the installed transformers for example.
        strict: checkpoints that call themselves ChatGLM and are not ChatGLM-6B are refused.
    """

    version: str
    revision: str
    enabled: bool
    switch: str
    backend: str
    backend_reason: str
    transformers_version: str | None
    torch_version: str | None
    patched: tuple[str, ...]
    served: dict[tuple[str, str], int]
    passed_through: dict[str, str]
    operators: dict[str, Choices]
    captured_generations: dict[str, int]
    plain_generations: dict[str, int]
    framework: tuple[str, ...]
    notices: tuple[str, ...]
    strict: bool = False

    def __str__(self) -> str:
        lines = [
            f"faster_chatglm_6b {self.version}: {self.switch}",
            f"  behaviour of   THUDM/chatglm-6b at {self.revision}",
            f"  backend        {self.backend} ({self.backend_reason})",
            *(f"  {line}" for line in self.framework),
        ]
        lines += _section("noticed", self.notices)
        lines += _section("patched", self.patched, "nothing")
        lines += _section(
            "served", [_counted(f"{kind} of {name}", n) for (kind, name), n in self.served.items()], "nothing yet"
        )
        lines += _section("left to its own code", [f"{name}: {why}" for name, why in self.passed_through.items()])
        lines += _section("operators", self._operator_lines(), "not chosen yet: this happens when a model is loaded")
        lines += _section("generations", self._generation_lines(), "none yet")
        return "\n".join(lines)

    def _operator_lines(self) -> list[str]:
        lines = []
        for device_dtype, choices in self.operators.items():
            lines.append(f"on {device_dtype}")
            width = max(map(len, choices), default=0)
            lines += [f"  {name:<{width}}  {what} ({why})" for name, (what, why) in choices.items()]
        return lines

    def _generation_lines(self) -> list[str]:
        lines = []
        for path, reasons in (
            ("captured loop", self.captured_generations),
            ("plain path", self.plain_generations),
        ):
            if reasons:
                lines.append(f"{path}: {sum(reasons.values())}")
                lines += [f"  {_counted(reason, count)}" for reason, count in reasons.items() if reason]
        return lines


def report(
    version: str, revision: str, enabled: bool, switch: str, chosen: backend.Backend, patched: tuple[str, ...]
) -> Status:
    """Return the present state, from what the caller knows and what was recorded here."""
    with _lock:
        return Status(
            version=version,
            revision=revision,
            enabled=enabled,
            switch=switch,
            backend=chosen.name,
            backend_reason=chosen.reason,
            transformers_version=versions.installed_version("transformers"),
            torch_version=None if backend.is_oneflow() else versions.installed_version("torch"),
            patched=patched,
            served=dict(_served),
            passed_through=dict(_passed_through),
            operators={key: dict(choices) for key, choices in _operators.items()},
            captured_generations={why: n for (path, why), n in _generations.items() if path == "captured"},
            plain_generations={why: n for (path, why), n in _generations.items() if path == "plain"},
            framework=tuple(backend.framework_lines()),
            notices=tuple(_notices),
        )


def _section(title: str, lines: Sequence[str], if_empty: str | None = None) -> list[str]:
    if not lines:
        return [] if if_empty is None else [f"  {title:<14} {if_empty}"]
    return [f"  {title}"] + [f"    {line}" for line in lines]


def _counted(text: str, count: int) -> str:
    return text if count == 1 else f"{text} ({count} times)"
