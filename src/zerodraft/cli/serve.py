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

    Requests take turns step by step, or share a batch where many ask a looped model, and greedy answers have the tokens
    of plain decoding, whatever their company. Conversations go on from keys and values that are kept. Only this machine
    can ask unless --host says otherwise; then set a key, by ZERODRAFT_API_KEY or --api-key. SIGTERM and Ctrl-C end it
    in order.
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
    """The port; 0: any that is free."""
    api_key: str = metavar("KEY", default="")
    """Ask every client for this key; the environment variable keeps it out of the list of processes."""
    cors: tuple[str, ...] = each("ORIGIN", default=())
    """A web page's origin that may ask, or *; may be repeated."""
    parallel: int = 4
    """Answers that are written at once, by turns and with drafts."""
    batch: int = 16
    """Beyond them: answers of a looped model written together, over depth (0: none)."""
    queue: int = 64
    """Answers that may wait; more are refused (429)."""
    max_prompt_tokens: int | None = None
    """The longest prompt; default: what the model has positions for."""
    max_total_tokens: int | None = None
    """The longest prompt and answer together; likewise."""
    max_body_kib: int = 1024
    """The largest request, in KiB."""
    max_seconds: float = 600.0
    """The longest that a request may take."""
    grace: float = 30.0
    """Seconds for running answers at the end."""
    kept_mib: float = 512.0
    """Memory for keys and values of finished texts, in MiB."""
    exit_rule: str = metavar("RULE", default="off")
    """When a looped model's tokens stop (see 'zerodraft generate')."""

    def check(self) -> None:
        """The numbers, and that there is something to serve with."""
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
            raise ZerodraftError("the API key may hold ASCII letters, digits and signs alone, and no spaces")
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
