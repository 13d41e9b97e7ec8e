"""Flags from dataclasses: every kind of field, the same values and errors as a YAML recipe, and suggestions."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from rich.console import Console

from zerodraft.cli.command import Command, Result, overrides_of, positional, settings_of
from zerodraft.cli.flags import field_docs, flags_of, parse
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.recipe import Recipe, TrainingRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part."""

    rate: float = 0.1
    """How fast."""
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] | Literal["uniform"] = "uniform"
    free: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe(Command):
    """Shows what was parsed."""

    example: ClassVar[str] = "zerodraft probe hi"

    text: str = positional("TEXT", default="")
    """Some text,
    on two lines."""
    max_steps: int = 3
    on: bool = True
    kind: Literal["a", "b"] = "a"
    limit: int | None = 5
    section: Section = field(default_factory=Section)

    def run(self, console: Console) -> Result:
        """Nothing to do."""
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Train(Probe):
    """Takes a recipe's flags too."""

    overrides: dict[str, Any] = overrides_of(Recipe)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled(Command):
    """Has the fields of another dataclass as its own flags."""

    example: ClassVar[str] = "zerodraft settled"

    count: int = 1
    section: Section = settings_of(Section)

    def run(self, console: Console) -> Result:
        """Nothing to do."""
        return {}


def probe(*words: str) -> Probe:
    return parse(Probe, words, "probe")


def test_nothing_given_means_the_defaults() -> None:
    assert probe() == Probe()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max-steps", "7"], "max_steps", 7),
        (["--max_steps=7"], "max_steps", 7),
        (["--no-on"], "on", False),
        (["--on"], "on", True),
        (["--kind", "b"], "kind", "b"),
        (["--limit", "none"], "limit", None),
        (["--json"], "json", True),
        (["two words"], "text", "two words"),
        (["--no-on", "hello"], "text", "hello"),
        (["hello", "--no-on"], "text", "hello"),
        (["--", "--not-a-flag"], "text", "--not-a-flag"),
        (["-1 is a number"], "text", "-1 is a number"),
        (["none"], "text", "none"),
    ],
)
def test_values(words: list[str], name: str, value: object) -> None:
    assert getattr(probe(*words), name) == value


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["--section.rate", "1e-3"], Section(rate=1e-3)),
        (["--section.rate", "-2"], Section(rate=-2.0)),
        (["--section.names", "a", "b"], Section(names=("a", "b"))),
        (["--section.names", "a", "--section.names", "b", "c"], Section(names=("a", "b", "c"))),
        (["--section.names"], Section()),
        (["--section.weights", "1", "2.5"], Section(weights=(1.0, 2.5))),
        (["--section.weights", "uniform"], Section(weights="uniform")),
    ],
)
def test_sections(words: list[str], section: Section) -> None:
    assert parse_section(words) == section


def parse_section(words: list[str]) -> Section:
    return parse(Flat, words, "flat").section


@dataclass(frozen=True, kw_only=True, slots=True)
class Flat:
    """One section only."""

    section: Section = field(default_factory=Section)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-stps", "3"], r"unknown flag '--max-stps' \(did you mean '--max-steps'\?\)"),
        (["--no-onn"], r"unknown flag '--no-onn' \(did you mean '--no-on'\?\)"),
        (["--zzz"], "unknown flag '--zzz'; see 'zerodraft probe --help'"),
        (["-x"], "unknown flag '-x'"),
        (["--max-steps", "ten"], "'max_steps' must be a whole number, got 'ten'"),
        (["--max-steps"], "--max-steps: expected one argument"),
        (["--kind", "c"], "'kind' must be one of 'a', 'b', got 'c'"),
        (["--section.rate", "fast"], "'section.rate' must be a number, got 'fast'"),
        (["one", "two"], "unexpected word 'two'"),
        (["--max", "3"], "unknown flag '--max'"),
    ],
)
def test_errors_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        probe(*words)


def test_recipe_flags_are_collected_under_their_dotted_keys() -> None:
    words = ["--training.steps", "5", "--training.learning-rate=1e-4", "--training.no-tensorboard", "--output", "out"]
    command = parse(Train, [*words, "--model.ztt.zero_rope", "none", "--model.ztt.ffn-gate", "true", "hi"], "train")
    assert command.overrides == {
        "output": "out",
        "training.steps": 5,
        "training.learning_rate": "1e-4",
        "training.tensorboard": False,
        "model.ztt.zero_rope": "none",
        "model.ztt.ffn_gate": True,
    }
    assert command.text == "hi"


def test_every_recipe_key_has_a_flag_and_a_help_text() -> None:
    flags = {flag.name: flag for flag in flags_of(Train) if flag.collector}
    assert "--training.muon-learning-rate" in flags
    assert not [name for name, flag in flags.items() if not flag.doc]


def test_field_docs_reads_the_docstrings_under_the_fields() -> None:
    assert field_docs(Probe)["text"] == "Some text, on two lines."
    assert field_docs(TrainingRecipe)["bf16"] == "bfloat16 autocast."
    assert "max_steps" not in field_docs(Probe)


def test_fields_of_another_dataclass_can_be_flags_of_their_own_names() -> None:
    names = ["--json", "--count", "--rate", "--names", "--weights", "--free"]
    assert [flag.name for flag in flags_of(Settled)] == names
    assert parse(Settled, [], "settled").section == Section()
    given = parse(Settled, ["--rate", "0.5", "--names", "a", "b", "--free.x", "3", "--count", "2"], "settled")
    assert given.section == Section(rate=0.5, names=("a", "b"), free={"x": 3})
    assert given.count == 2
    with pytest.raises(ZerodraftError, match="'rate' must be a number, got 'x'"):
        parse(Settled, ["--rate", "x"], "settled")
