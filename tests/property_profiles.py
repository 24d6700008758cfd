"""Examples of a property test: few and always the same in ``make test``, many new ones in ``make test-long``.

hypothesis' own option --hypothesis-profile=long chooses.
"""

from hypothesis import HealthCheck, Phase, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("short", derandomize=True, database=None, **_COMMON)
settings.register_profile("long", print_blob=True, **_COMMON)
settings.load_profile("short")


def examples(short: int, long: int, shrink: bool = True) -> settings:
    """Decorator of a property test: how many examples it tries in either profile.

    Args:
        shrink: look for a smaller example where one fails, which takes hundreds of further runs.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    return settings(max_examples=long if settings.get_current_profile_name() == "long" else short, phases=phases)
