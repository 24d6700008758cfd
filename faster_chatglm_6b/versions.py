"""Installed releases of other packages, and how two of them compare. Nothing here imports the package in question."""

import sys
from importlib.util import find_spec


def installed_version(package: str) -> str | None:
    """Return the version of ``package``, from the loaded module or from its metadata; None if it is not installed."""
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    # Imported here: it takes 20 ms, and `import faster_chatglm_6b` must stay light.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_installed(package: str) -> bool:
    """Return whether ``package`` is loaded already or can be found."""
    if package in sys.modules:  # find_spec raises for a loaded module without a spec, as test doubles are
        return sys.modules[package] is not None
    return find_spec(package) is not None


def is_too_old(version: str, oldest: str) -> bool:
    """Return whether ``version`` precedes ``oldest``. Development and local versions count as their release."""
    return _release(version) < _release(oldest)


def _release(version: str) -> tuple[int, ...]:
    """Return (4, 45, 2) for "4.45.2", (2, 13, 0) for "2.13.0a0+git1": only the leading numbers are compared."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
