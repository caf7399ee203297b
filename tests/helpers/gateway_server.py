"""A gateway on a real socket, in a thread, over a FakeClient; and a tiny model folder for its tokenizer."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvloop
from fake_client import VOCAB, FakeClient
from nybble.server.app import build_app
from nybble.server.engine_metrics import EngineCollector
from nybble.server.fleet import Fleet
from nybble.server.gateway import Gateway
from nybble.server.lifecycle import HttpServer, admin_of
from nybble.server.limits import Admission
from nybble.server.metrics import Metrics
from nybble.server.models import load_model, served_name
from nybble.server.settings import load_settings
from nybble.server.sockets import bind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and 'rude' in m.content %}"
    "{{ raise_exception('no rude system messages') }}{% endif %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if shout %}!!{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_TEXT = ["Once upon a time there was a little dog who ran to the park.", "Hello world, it is a day of sun."]
T = TypeVar("T")


def write_model(folder: Path, **config: Any) -> Path:
    """Everything of a model but its weights: byte-level BPE with <s> (put first) and </s>, and a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": {"max_position_embeddings": 256, "vocab_size": VOCAB, "eos_token_id": 0, **config},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE},
        "generation_config.json": {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@dataclass
class GatewayServer:
    """A running server and the levers behind it."""

    url: str
    gateway: Gateway
    app: Any
    client: FakeClient
    loop: asyncio.AbstractEventLoop
    http: httpx.Client

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the server's thread."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout=10)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        if body is not None:
            kwargs["json"] = body
        return self.http.post(path, **kwargs)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.http.get(path, **kwargs)

    def wait(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Poll a condition in the server's thread."""
        deadline = time.monotonic() + seconds
        while not self.call(condition):
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.005)


@contextlib.contextmanager
def running(folder: Path, client: FakeClient | None = None, **options: Any) -> Iterator[GatewayServer]:
    """Serve until the block is left."""
    options = {"model": str(folder), "served_model_name": "tiny", "log_level": "error", **options}
    settings = load_settings(options)
    started: list[GatewayServer] = []
    ready = threading.Event()
    stop = threading.Event()

    async def main() -> None:
        fake = client or FakeClient()
        name = served_name(settings)
        metrics = Metrics(name, settings.vllm_metrics)
        model = load_model(settings, folder, name, fake, metrics)  # type: ignore[arg-type]
        fake.on_stats = model.metrics.step
        fleet = Fleet(settings, metrics)
        models = fleet.models
        fleet.serve(model)
        metrics.registry.register(EngineCollector(models, {"gateway": 0.1}))
        admission = Admission(settings.max_num_seqs, settings.max_queued_requests, settings.max_queued_tokens)
        gateway = Gateway(settings, models, metrics, admission)
        async with admin_of(gateway, fleet) as admin:
            app = build_app(gateway, admin)
            server = HttpServer(app, gateway)
            with bind("127.0.0.1", 0) as listener:
                port = listener.getsockname()[1]
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                while not server.started:
                    await asyncio.sleep(0.001)
                url = f"http://127.0.0.1:{port}"
                http = httpx.Client(base_url=url, timeout=20, verify=False)
                started.append(GatewayServer(url, gateway, app, fake, asyncio.get_running_loop(), http))
                ready.set()
                while not stop.is_set():
                    await asyncio.sleep(0.01)
                await fake.stop()
                server.should_exit = True
                await serving

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20)
    assert started, "the server did not start"
    try:
        yield started[0]
    finally:
        started[0].http.close()
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
