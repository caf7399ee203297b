"""The CLI's options of ``quantize`` are those of the task, and no more."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from nybble.engine.errors import ConfigError
from nybble.engine.quantize.methods import METHODS, RECIPES
from nybble.engine.quantize.options import QuantizeOptions
from nybble.server.cli_quantize import Quantize


def test_options_and_defaults_are_the_tasks_own() -> None:
    ours = {field.name: field.default for field in fields(Quantize)}
    theirs = {field.name: field.default for field in fields(QuantizeOptions)}
    assert ours == theirs
    assert [name for name, default in ours.items() if default is MISSING] == ["model", "out"]


def test_the_methods_are_those_there_are() -> None:
    hints = get_type_hints(Quantize)
    assert set(get_args(hints["method"])) == set(METHODS)
    assert set(get_args(hints["base"])) == set(RECIPES)


def test_dynamic_is_json_or_a_file_of_it(tmp_path: Path) -> None:
    text = '{"model.layers.0": {"bits": 8}, "-:model.layers.1.mlp": {}}'
    (tmp_path / "dynamic.json").write_text(text)
    for given in (text, str(tmp_path / "dynamic.json")):
        options = Quantize(model="a", out="b", dynamic=given).options()
        assert options["dynamic"] == {"model.layers.0": {"bits": 8}, "-:model.layers.1.mlp": {}}
        assert QuantizeOptions(**options).dynamic == options["dynamic"]
    assert Quantize(model="a", out="b").options()["dynamic"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [("{", "is not JSON"), ("no/such/file", "cannot be read"), ('{"(": {}}', "is no regular expression")],
)
def test_bad_dynamic_names_the_option(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--dynamic .*{message}"):
        QuantizeOptions(**Quantize(model="a", out="b", dynamic=given).options())
