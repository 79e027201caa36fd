"""How a server is to run: what users choose, each declared once."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gap_export.errors import UsageError
from gap_export.spec.requests import DEFAULT_BACKEND, BackendOptions, GrammarName, Option

if TYPE_CHECKING:
    from gap_export.runtime.session import BackendName, GroundingSession

MIN_KEY_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What a server accepts, and how much of it.

    Example:
        >>> from gap_export.serving.options import ServeOptions
        >>> ServeOptions(port=9000).queue
        128
    """

    host: Annotated[
        str,
        Option(
            "Address to listen at; any other than this machine's own needs --api-keys.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Option("Port to listen at; 0 for a free one.", metavar="N", min=0, max=65535)
    ] = 8000
    api_keys: Annotated[
        Path | None,
        Option(
            f"File of keys of at least {MIN_KEY_LENGTH} characters, one a line; a request has to "
            "bear one of them.",
            metavar="FILE",
        ),
    ] = None
    queue: Annotated[
        int,
        Option(
            "Most requests at a time, waiting and running; further ones are answered 429.",
            metavar="N",
            min=1,
        ),
    ] = 128
    batch: Annotated[
        int,
        Option("Most expressions about one image that run together.", metavar="N", min=1),
    ] = 16
    deadline_s: Annotated[
        float,
        Option(
            "Seconds until a request is answered 504; a request may ask for less.",
            flag="--deadline",
            metavar="SECONDS",
            min=1,
        ),
    ] = 30.0
    decode_s: Annotated[
        float,
        Option(
            "Seconds that decoding an image may take.",
            flag="--decode-limit",
            metavar="SECONDS",
            min=1,
        ),
    ] = 10.0
    max_body_mib: Annotated[
        int,
        Option("Largest body of a request.", flag="--max-body", metavar="MIB", min=1),
    ] = 32
    cors_origins: Annotated[
        tuple[str, ...],
        Option(
            "Origin whose pages may read answers, such as https://example.org. Repeatable. "
            "[default: none]",
            flag="--cors-origin",
            metavar="ORIGIN",
        ),
    ] = ()

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """All that an application is made of; plain data, so that another process can have it.

    Attributes:
        bundles: Folders; a model's name is its folder's.
        options: What the server accepts.
        backend: What runs the bundles.
        backend_options: How it runs them.
        num_threads: Of a CPU; None leaves it to the backend.
        grammar: Constrains answers; None leaves them the model's own.
    """

    bundles: tuple[Path, ...]
    options: ServeOptions = ServeOptions()
    backend: BackendName = "onnxruntime"
    backend_options: BackendOptions = DEFAULT_BACKEND
    num_threads: int | None = None
    grammar: GrammarName | None = None

    def named_bundles(self) -> dict[str, Path]:
        """The bundles by name.

        Raises:
            UsageError: none, or two of one name.
        """
        named = {Path(path).resolve().name: Path(path) for path in self.bundles}
        if not named or len(named) < len(self.bundles):
            raise UsageError(
                "each bundle needs a name of its own, which is its folder's",
                seen=", ".join(map(str, self.bundles)) or "no bundle",
            )
        return named

    def open(self, bundle: Path) -> GroundingSession:
        """A session of one of the bundles.

        Raises:
            GapExportError: see ``GroundingSession.open``.
        """
        from gap_export.runtime.session import GroundingSession

        return GroundingSession.open(
            bundle,
            backend=self.backend,
            engines=self.backend_options.engines,
            num_threads=self.num_threads,
            openvino=self.backend_options.openvino,
            form=self.backend_options.form,
            grammar=self.grammar,
        )


class ApiKeys:
    """Tells right keys from wrong ones, in a time that does not depend on the key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, options: ServeOptions) -> ApiKeys:
        """The keys that the options ask for.

        Raises:
            UsageError: the file cannot be read, holds no key or a short one; or other machines
                could ask, and there are no keys.
        """
        if options.api_keys is None:
            if not options.is_local:
                raise UsageError(
                    "other machines could ask this server, and no key is asked of them",
                    seen=f"--host {options.host} without --api-keys",
                    fix="give --api-keys FILE, or leave out --host",
                )
            return cls([])
        try:
            lines = options.api_keys.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as err:
            raise UsageError("the file of API keys cannot be read", seen=err) from err
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys or min(map(len, keys)) < MIN_KEY_LENGTH:
            raise UsageError(
                "the file of API keys holds no key, or a short one",
                seen=options.api_keys,
                allowed=f"keys of at least {MIN_KEY_LENGTH} characters, one a line",
                fix='make one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
            )
        return cls(keys)

    def __bool__(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._digests)

    def find(self, given: str) -> int | None:
        """Which key was given, by its place in the file; None for a wrong one."""
        digest = hashlib.sha256(given.encode()).digest()
        # All are compared, whether one before was equal or not.
        equal = [hmac.compare_digest(digest, each) for each in self._digests]
        return equal.index(True) if any(equal) else None
