"""How many replicas there are to be, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

from gap_export.errors import UsageError
from gap_export.serving.options import ServeSettings
from gap_export.spec.requests import Option

_NUMBERS = re.compile(r"(\d{1,4})(?::(\d{1,4}))?")
# A replica answers one question at a time: of so many, each waits for one.
_TARGET_ONGOING = 2
_DEFAULT_REPLICAS = "2"


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Replicas of a server.

    Example:
        >>> from gap_export.serving.replicas.options import ReplicaOptions
        >>> ReplicaOptions(ray=True, replicas="2:8").numbers
        (2, 8)
    """

    ray: Annotated[
        bool,
        Option("Run the models in replicas, by Ray Serve on this machine; extra serve-ray."),
    ] = False
    ray_address: Annotated[
        str | None,
        Option("With --ray: a Ray cluster to join, from one of its nodes.", metavar="HOST:PORT"),
    ] = None
    replicas: Annotated[
        str | None,
        Option(
            "With --ray: how many replicas; MIN:MAX adds and removes them as requests wait. "
            f"[default: {_DEFAULT_REPLICAS}]",
            metavar="N|MIN:MAX",
        ),
    ] = None

    @property
    def numbers(self) -> tuple[int, int]:
        """The fewest and the most replicas.

        Raises:
            UsageError: not one or two numbers, or not in order.
        """
        given = _DEFAULT_REPLICAS if self.replicas is None else self.replicas
        found = _NUMBERS.fullmatch(given)
        fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= fewest <= most:
            raise UsageError(
                "not a number of replicas",
                seen=f"--replicas {given}",
                allowed="N, or MIN:MAX with 1 <= MIN <= MAX",
            )
        return fewest, most

    def check(self, settings: ServeSettings) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: options of replicas without any; a backend or an address that they cannot
                have; see :attr:`numbers`.
        """
        given = {"--ray-address": self.ray_address, "--replicas": self.replicas}
        alone = [flag for flag, value in given.items() if value is not None]
        if not self.ray:
            if alone:
                raise UsageError("only replicas have this option", seen=alone[0], fix="add --ray")
            return
        _ = self.numbers
        if settings.backend == "tensorrt":
            raise UsageError(
                "replicas run on CPUs",
                seen="tensorrt",
                allowed="ort, openvino",
                fix="leave --ray out",
            )
        if self.ray_address is not None and self.ray_address.startswith("ray://"):
            raise UsageError(
                "requests cannot be handed on through Ray's client",
                seen=f"--ray-address {self.ray_address}",
                allowed="HOST:PORT of the cluster",
                fix="run the server on one of the cluster's nodes",
            )

    def deployment(self, settings: ServeSettings) -> dict[str, Any]:
        """What Ray Serve is asked for, as arguments of ``ray.serve.deployment``.

        Args:
            settings: Of each replica, see :func:`replica_settings`.
        """
        fewest, most = self.numbers
        count: dict[str, Any] = {"num_replicas": fewest}
        if fewest != most:
            count = {
                "autoscaling_config": {
                    "min_replicas": fewest,
                    "initial_replicas": fewest,
                    "max_replicas": most,
                    "target_ongoing_requests": _TARGET_ONGOING,
                    "upscale_delay_s": 5.0,
                }
            }
        return {
            **count,
            "ray_actor_options": {"num_cpus": settings.num_threads},
            # What asks about one image can run together; what is more waits at the front, where
            # any replica may take it.
            "max_ongoing_requests": max(settings.options.batch, _TARGET_ONGOING),
            "graceful_shutdown_timeout_s": settings.options.deadline_s,
            "max_constructor_retry_count": 3,
        }


def replica_settings(settings: ServeSettings) -> ServeSettings:
    """What a replica's application is made of: the front has asked for keys and kept the queue."""
    options = replace(settings.options, host="127.0.0.1", api_keys=None, cors_origins=())
    return replace(
        settings,
        bundles=tuple(path.resolve() for path in settings.bundles),
        options=options,
        # Replicas share the CPUs of a node, and Ray counts them.
        num_threads=settings.num_threads or 1,
    )
