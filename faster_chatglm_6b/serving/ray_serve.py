"""Replicas of the server on Ray Serve, a GPU each; Ray spreads requests over them. Needs the extra ``ray``.

serve run faster_chatglm_6b.serving.ray_serve:build tiny=true     # Ray's own command, on one machine
serve deploy examples/serve_ray.yaml                              # on a cluster
"""

from typing import Annotated, Any, Literal

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.metrics import Gauge

from ..checkpoint import by_name
from ..decoding.request import check_speculate
from ..recognition import HUB_ID
from .api.server import Settings, application, set_up_log
from .defaults import api_keys, most_rows, served_names
from .rows.making import make_rows

# Requests to a replica beyond those that its door lets in: it turns them away itself, and answers /health meanwhile.
_BESIDE = 64
_HEALTH_CHECK_SECONDS = 5.0

Word = Annotated[str, Field(pattern=r"\S")]
# A command line writes one text, not a list of one.
Words = Annotated[list[Word] | None, BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


class Options(BaseModel):
    """The options of the command ``serve``, for one replica, and how many replicas there are.

    Attributes:
        min_replicas, max_replicas: Ray adds replicas, up to the most, while each has more ongoing requests than
            ``target_ongoing_requests``.
        max_rows: left out, what the command takes for a GPU or a CPU.
        target_ongoing_requests: three quarters of the rows if left out.
        num_gpus: of a replica; left out, 1 if there is any now and ``device`` is not the CPU.
        num_cpus: of a replica; without a GPU, the threads that it computes with.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Word = HUB_ID
    tiny: bool = False
    bits: int | None = None
    device: Word | None = None
    api_key: Words = Field(None, repr=False)
    served_model_name: Words = None
    max_rows: int | None = Field(None, ge=1)
    memory: float = Field(0.9, gt=0, le=1)
    max_waiting: int = Field(1024, ge=0)
    shutdown_timeout: int = Field(30, ge=0)
    speculate: int | Literal["auto"] = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    num_gpus: float | None = Field(None, ge=0)
    num_cpus: float = Field(1, gt=0)

    @model_validator(mode="after")
    def _go_together(self) -> "Options":
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits is {self.bits}, but weights have 4 or 8; leave it out for floats.")
        check_speculate(self.speculate)
        if self.tiny and "model" in self.model_fields_set:
            raise ValueError("More than one checkpoint is named: give model or tiny.")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, but min_replicas {self.min_replicas}; raise one or lower the "
                "other."
            )
        return self

    def settings(self) -> Settings:
        """Return how a replica runs; keys that are not given come from the environment."""
        return Settings(
            names=tuple(self.served_model_name or served_names(None if self.tiny else self.model)),
            keys=api_keys(self.api_key),
            rows=self._rows(),
            memory=self.memory,
            most_waiting=self.max_waiting,
            shutdown_timeout=self.shutdown_timeout,
            log_level=self.log_level,
            speculate=self.speculate,
            names_requests=False,  # Ray's proxy writes X-Request-Id
        )

    def deployment(self) -> dict[str, Any]:
        """Return Ray's settings of the deployment."""
        inside = self._rows() + self.max_waiting
        return {
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self._gpus()},
            "max_ongoing_requests": inside + _BESIDE,
            "max_queued_requests": inside,
            # Ray sends a replica that must go no more requests, and waits so long for those that it has.
            "graceful_shutdown_timeout_s": self.shutdown_timeout,
            "health_check_period_s": _HEALTH_CHECK_SECONDS,
            # The replica's own line says more.
            "logging_config": {"enable_access_log": False},
            **self._replicas(),
        }

    def _rows(self) -> int:
        return self.max_rows or most_rows("cuda" if self._gpus() else "cpu")

    def _gpus(self) -> float:
        if self.num_gpus is not None:
            return self.num_gpus
        there = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else torch.cuda.device_count()
        return 0 if self.device == "cpu" else min(1, there)

    def _replicas(self) -> dict[str, Any]:
        if self.max_replicas in (None, self.min_replicas):
            return {"num_replicas": self.min_replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests or max(1.0, 0.75 * self._rows()),
            }
        }


class Replica:
    """What Ray asks of a replica beside HTTP; ``serve.ingress`` gives it the application as ``app``."""

    app: FastAPI

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def check_health(self) -> None:
        """Hand the numbers of /metrics to Ray; raise if the engine has failed, so that Ray replaces this replica."""
        service = self.app.state.service
        self._publish(service.metrics.registry)
        if not service.engine.is_alive:
            raise RuntimeError("The engine of this replica has failed.")

    def _publish(self, registry: Any) -> None:
        """Set one of Ray's gauges for each sample: a request for /metrics reaches only one of the replicas."""
        for family in registry.collect():
            for sample in family.samples:
                name = sample.name.replace(":", "_")
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, family.documentation, tuple(sample.labels))
                self._gauges[name].set(sample.value, sample.labels)


def build(options: Options) -> serve.Application:
    """Return the application for ``serve run`` and for ``import_path``: one deployment, with all routes of the server.

    Args:
        options: as a dictionary where Ray calls it, which checks their names and values.
    """

    def app() -> FastAPI:
        """Load the model, in the replica's process."""
        settings = options.settings()
        set_up_log(settings.log_level)
        name = by_name.tiny_checkpoint() if options.tiny else options.model
        tokenizer, model = by_name.load(name, options.bits, by_name.device_of(options.device))
        return application(
            model, tokenizer, settings, make_rows(model, settings.rows, settings.memory, settings.speculate)
        )

    return serve.deployment(serve.ingress(app)(Replica), name="chatglm").options(**options.deployment()).bind()
