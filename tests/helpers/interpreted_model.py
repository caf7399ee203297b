"""A model in the engine over interpreted GPU kernels: the test flag that gives a CPU a GPU's place."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton_interpreter
from nybble.engine.config import EngineConfig
from nybble.engine.model.decoder import Decoder
from nybble.engine.model.loader import LoadedModel, load_model
from nybble.engine.model_files import ModelFiles
from nybble.kernels.dispatch import Ops
from nybble.kernels.triton import launch


def as_if_on(architecture: str) -> Any:
    """A patch (see unittest.mock) under which every device is a small GPU of ``architecture``."""
    machine = launch.Machine("interpreted", architecture, 2)
    return mock.patch.object(launch.Machine, "of", staticmethod(lambda device: machine))


def load_interpreted(folder: Path, dtype: torch.dtype, architecture: str) -> tuple[Decoder, LoadedModel]:
    """The model in ``folder`` with the kernels and launches that a GPU of ``architecture`` gets."""
    target = triton_interpreter.InterpretedTarget("cpu", dtype)
    with as_if_on(architecture):
        config = EngineConfig(str(folder), "cpu")
        loaded = load_model(ModelFiles(folder), config, lambda *_: None, target)
    ops = Ops.resolve(target)
    return Decoder(loaded.config, loaded.weights, ops, target.activation_dtype), loaded
