"""Numbers of examples for property tests: few and always the same in ``make test``, many new in ``make test-long``.

The option ``--hypothesis-profile=long`` of hypothesis chooses the second.
"""

from hypothesis import HealthCheck, Phase, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("short", derandomize=True, database=None, **_COMMON)
settings.register_profile("long", print_blob=True, **_COMMON)
settings.load_profile("short")


def examples(short: int, long: int, shrink: bool = True) -> settings:
    """Return a decorator that sets how many examples a property test tries in either profile.

    Args:
        short: examples in the default profile.
        long: examples in the profile ``long``.
        shrink: look for a smaller example if one fails, which takes hundreds of further runs.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    return settings(max_examples=long if settings.get_current_profile_name() == "long" else short, phases=phases)
