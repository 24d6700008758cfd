"""Examples of a property test: few and always the same in ``make test``, many new ones in ``make test-long``.

hypothesis' own option --hypothesis-profile=long chooses.
"""

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("short", derandomize=True, database=None, **_COMMON)
settings.register_profile("long", print_blob=True, **_COMMON)
settings.load_profile("short")


def examples(short: int, long: int) -> settings:
    """Decorator of a property test: how many examples it tries in either profile."""
    return settings(max_examples=long if settings.get_current_profile_name() == "long" else short)
