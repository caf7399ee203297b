"""An engine without a model for tests of client and worker: ``--factory fake_engine:build``.

It answers each prompt with its own tokens, one a step, over and over, until max_tokens. The first token of
a prompt may be a command (below); the model's folder name may be one for the load.
"""

import os
import signal
import sys
import time

from nybble.engine.errors import ConfigError, RequestError
from nybble.engine.records import EngineStats, ModelInfo, SequenceOutput

SLOW = 9001  # 20 ms a step
CRASH = 9002  # an exception in step
KILL = 9003  # SIGKILL from within
HANG = 9004  # a step that never ends
REFUSE = 9005  # RequestError from add
SEGFAULT = 9006


class FakeEngine:
    def __init__(self):
        self.requests = {}
        self.done = {}
        self.steps = 0
        self.tokens = 0

    @property
    def has_work(self):
        return bool(self.requests)

    def add(self, request):
        if request.prompt_token_ids[0] == REFUSE:
            raise RequestError("refused by the fake")
        self.requests[request.request_id] = request
        self.done[request.request_id] = 0

    def abort(self, request_id):
        self.requests.pop(request_id, None)

    def step(self):
        self.steps += 1
        outputs = []
        for request_id, request in list(self.requests.items()):
            command, *_ = request.prompt_token_ids
            if command == SLOW:
                time.sleep(0.02)
            elif command == CRASH:
                raise ZeroDivisionError("asked to crash")
            elif command == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif command == SEGFAULT:
                os.kill(os.getpid(), signal.SIGSEGV)
            elif command == HANG:
                time.sleep(3600)
            count = self.done[request_id]
            token = request.prompt_token_ids[count % len(request.prompt_token_ids)]
            self.done[request_id] = count + 1
            self.tokens += 1
            finished = count + 1 == request.params.max_tokens
            outputs.append(SequenceOutput(request_id, [token], finish_reason="length" if finished else None))
            if finished:
                del self.requests[request_id]
        return outputs

    def stats(self):
        return EngineStats(self.steps, len(self.requests), 0, 0, 0.0, 1, 0, 0, 0, self.tokens)


def build(config, progress):
    name = os.path.basename(config.model)
    progress("load", 1, 2, "half of it")
    print("fake engine up", name, file=sys.stderr)
    if name == "config-error":
        raise ConfigError("--model config-error: cannot work; name another")
    if name == "load-crash":
        raise OSError("the disk is on fire")
    if name == "load-hang":
        time.sleep(3600)
    progress("load", 2, 2)
    environment = {
        key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    info = ModelInfo(
        architecture="Fake",
        dtype="float32",
        device="cpu",
        quant_method="none",
        bits=32,
        group_size=-1,
        kernel=repr(environment),
        vocab_size=10_000,
        max_model_len=100,
        eos_token_ids=[0],
        weight_bytes=0,
        kv_bytes=0,
        num_kv_blocks=1,
        block_size=16,
        num_threads=1,
        load_seconds=0.0,
    )
    return FakeEngine(), info
