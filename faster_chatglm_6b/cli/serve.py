"""Load a checkpoint and serve it over HTTP."""

import argparse
import importlib.util

from ..serving.defaults import api_keys, most_rows, served_names
from .checkpoint import load_asked
from .errors import CommandError
from .options import HUB_ID

_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal ends it.

    Raises:
        CommandError: libraries are missing, no checkpoint, too little memory, or a port that cannot be had.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'serve needs {", ".join(missing)}: install the extra with pip install -e ".[serve]".')
    names = tuple(arguments.served_model_name or _names(arguments))
    if not all(name.strip() for name in names):
        raise CommandError("--served-model-name is empty: give a name.", code=2)
    if not all(key.strip() for key in arguments.api_key or ()):
        raise CommandError("--api-key is empty: give a key, or leave it out to ask for none.", code=2)
    tokenizer, model = load_asked(arguments, default=HUB_ID)
    from ..serving.api.server import Settings, serve

    settings = Settings(
        host=arguments.host,
        port=arguments.port,
        names=names,
        keys=api_keys(arguments.api_key),
        rows=arguments.max_rows or most_rows(model.device.type),
        memory=arguments.memory,
        most_waiting=arguments.max_waiting,
        shutdown_timeout=arguments.shutdown_timeout,
        log_level=arguments.log_level,
        speculate=arguments.speculate,
    )
    try:
        code = serve(model, tokenizer, settings)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if code:
        raise CommandError(f"The server could not be started on {arguments.host}:{arguments.port}.", code)


def _names(arguments: argparse.Namespace) -> tuple[str, ...]:
    return served_names(None if arguments.tiny else arguments.word or arguments.model or HUB_ID)
