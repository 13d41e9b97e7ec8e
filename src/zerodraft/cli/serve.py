"""`zerodraft serve`: a model behind an HTTP server in the form of OpenAI's API."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from zerodraft.cli.command import Command, Result, each, metavar, positional, settings_of
from zerodraft.cli.decoding import Drafting, load_target
from zerodraft.cli.loading import Dtype
from zerodraft.common.errors import ZerodraftError

KEY = "ZERODRAFT_API_KEY"
"""The environment variable with the key, which no list of processes shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve(Command):
    """Serve a model over HTTP as OpenAI's API does, with drafts.

    Requests take turns step by step; many requests to a looped model share a batch. Greedy answers have the tokens of
    plain decoding, with and without other requests. Conversations reuse kept keys and values. Only this machine can
    connect unless --host says otherwise; then set a key with ZERODRAFT_API_KEY or --api-key. SIGTERM and Ctrl-C shut
    it down in order.
    """

    example: ClassVar[str] = "zerodraft serve smollm2 --port 8000"

    model: str = positional("MODEL", also=("model", "target"))
    """A causal language model or a Zero Token Transformer: directory, hub id or short name."""
    dtype: Dtype = "auto"
    """Dtype of the computation; auto: float32 on CPUs, else as stored."""
    drafting: Drafting = settings_of(Drafting)
    name: str = ""
    """What clients call the model; default: the last part of its own name."""
    host: str = metavar("ADDRESS", default="127.0.0.1")
    """Where to listen."""
    port: int = 8000
    """The port; 0: any free one."""
    api_key: str = metavar("KEY", default="")
    """Ask every client for this key; the environment variable keeps it out of the list of processes."""
    cors: tuple[str, ...] = each("ORIGIN", default=())
    """An origin of web pages that may connect, or *; may be repeated."""
    parallel: int = 4
    """Answers written at the same time, in turns and with drafts."""
    batch: int = 16
    """Further answers of a looped model, written in a batch over depth (0: none)."""
    queue: int = 64
    """Requests that may wait; more are refused (429)."""
    max_prompt_tokens: int | None = None
    """Longest prompt, in tokens; default: by the model's positions."""
    max_total_tokens: int | None = None
    """Longest prompt and answer together; the same default."""
    max_body_kib: int = 1024
    """Largest request, in KiB."""
    max_seconds: float = 600.0
    """Longest time of a request, in seconds."""
    grace: float = 30.0
    """Seconds that running answers have at shutdown."""
    kept_mib: float = 512.0
    """Memory for keys and values of finished texts, in MiB."""
    exit_rule: str = metavar("RULE", default="off")
    """When a looped model's tokens stop (see 'zerodraft generate')."""

    def check(self) -> None:
        """The numbers, and whether the packages of the extra `serve` are there."""
        self.drafting.check()
        for flag in ("parallel", "max_body_kib", "max_seconds"):
            if not getattr(self, flag) > 0:
                raise ZerodraftError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}; it must be above 0")
        for flag in ("batch", "queue", "grace", "kept_mib"):
            if not getattr(self, flag) >= 0:
                raise ZerodraftError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}; it must be 0 or more")
        for flag in ("max_prompt_tokens", "max_total_tokens"):
            if (value := getattr(self, flag)) is not None and value < 2:
                raise ZerodraftError(f"--{flag.replace('_', '-')} is {value}; it must be at least 2")
        if not 0 <= self.port < 65536:
            raise ZerodraftError(f"--port is {self.port}; it must be from 0 to 65535")
        key = self._key()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ZerodraftError("the API key may have only ASCII letters, digits and signs, and no spaces")
        try:
            import fastapi
            import prometheus_client
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ZerodraftError(
                f"'zerodraft serve' needs the serve extra ({error.name} is missing): pip install 'zerodraft[serve]'"
            ) from None
        del fastapi, prometheus_client

    def run(self, console: Console) -> Result:
        """Loads, listens, and returns once it was told to end."""
        from zerodraft.serve.load import serve_model
        from zerodraft.serve.process import Server, bound

        # before all that takes long
        sock = bound(self.host, self.port)
        model, tokenizer = load_target(self.model, self.dtype)
        drafter, drafts_by = self.drafting.find(model, self.model)
        name = self.name or Path(self.model).name
        served = serve_model(
            model,
            tokenizer,
            name,
            drafter,
            parallel=self.parallel,
            batch=self.batch,
            queue=self.queue,
            kept_mib=self.kept_mib,
            prompt_tokens=self.max_prompt_tokens,
            total_tokens=self.max_total_tokens,
            seconds=self.max_seconds,
            exit_rule=self.exit_rule,
        )
        server = Server(
            served,
            sock,
            key=self._key(),
            cors=self.cors,
            body_bytes=1024 * self.max_body_kib,
            grace=self.grace,
        )
        server.ready = lambda url: console.print(f"{name} with drafts by {drafts_by} at {url}")
        server.until_told()
        return {"model": name, "drafter": drafts_by}

    def _key(self) -> str:
        return self.api_key or os.environ.get(KEY, "")
