"""`zerodraft.decoder`: one call chooses everything, its texts are those of plain decoding; all kinds of drafters."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import zerodraft
from tests.decoding.generating import letters, model_of, prompts_of
from tests.generate.test_huggingface_door import Collector
from tests.saved import save, save_block, save_dflash, save_target, tiny_tokenizer
from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.hybrid import HybridDrafter
from zerodraft.drafters.kinds import KINDS, Exported, Judged, kind_that_can
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.masked_model import masked_from_target
from zerodraft.training.drafters.kinds import RECIPES

OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_target(tmp_path_factory.mktemp("target")))


def save_masked(target: Any, folder: Path) -> None:
    masked_from_target(target, num_layers=1, block_size=4).save_pretrained(folder)


def save_autoregressive(target: Any, folder: Path) -> None:
    save(LlamaForCausalLM(target.config), tiny_tokenizer(), folder)


SAVED: dict[str, Callable[[Any, Path], None]] = {
    "block": save_block,
    "dflash": save_dflash,
    "masked": save_masked,
    "autoregressive": save_autoregressive,
}


@pytest.fixture(scope="module")
def folders(target: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A drafter of each kind, with random weights."""
    found = {}
    for kind, keep in SAVED.items():
        torch.manual_seed(1)
        found[kind] = tmp_path_factory.mktemp("drafters") / kind
        keep(target, found[kind])
    return found


# -- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "ztt"])
@pytest.mark.parametrize("rows", [1, 3])
def test_its_texts_are_those_of_plain_decoding(family: str, rows: int) -> None:
    model, batch = model_of(family), prompts_of(rows)
    decode = zerodraft.decoder(model)
    plain = model.generate(**batch, **OPTIONS)
    assert torch.equal(decode.generate(model, **batch, **OPTIONS), plain)
    assert torch.equal(model.generate(**batch, **OPTIONS, custom_generate=decode), plain)
    assert isinstance(decode.drafter, PromptLookupDrafter)


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_and_stop_strings_need_no_help_of_transformers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, tokenizer = model_of("llama"), prompts_of(rows), letters()
    width = batch["input_ids"].shape[1]
    text = model.generate(**batch, **OPTIONS)
    stop = tokenizer.decode(text[0, width + 12 : width + 13])
    wanted, got = Collector(), Collector()
    plain = model.generate(**batch, **OPTIONS, stop_strings=[stop], tokenizer=tokenizer, streamer=wanted)
    assert rows > 1 or plain.shape[1] < text.shape[1]
    # `generate` hands a decoder neither of them; nobody looks for them here
    monkeypatch.setattr("zerodraft.generate.door.restore", lambda frame: pytest.fail("frames are read"))
    decode = zerodraft.decoder(model)
    ours = decode.generate(model, **batch, **OPTIONS, stop_strings=stop, tokenizer=tokenizer, streamer=got)
    assert torch.equal(ours, plain)
    assert (got.puts, got.ends) == (wanted.puts, wanted.ends)
    with pytest.raises(ZerodraftError, match="stop_strings need the model's tokenizer"):
        decode.generate(model, **batch, **OPTIONS, stop_strings=stop)


def test_a_model_without_a_name_decodes_with_copies() -> None:
    model = model_of("llama")
    assert model.name_or_path == ""
    assert isinstance(zerodraft.decoder(model).drafter, PromptLookupDrafter)
    three = zerodraft.decoder(model, "lookup:3").drafter
    assert isinstance(three, PromptLookupDrafter)
    assert three.max_ngram == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lookup:none", "after 'lookup:' comes"),
        ("lokup", "The drafter is neither lookup, lookup:N, self, self:C nor a model"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        zerodraft.decoder(model_of("llama"), name)


@pytest.mark.parametrize("drafter", [None, 5, "a model"])
def test_what_is_no_drafter_is_refused(drafter: Any) -> None:
    model = model_of("llama")
    given = model if drafter == "a model" else drafter
    # as a user calls them, without the checks of types that tests add
    decoder, init = inspect.unwrap(zerodraft.decoder), inspect.unwrap(zerodraft.DiffuSpec.__init__)
    for door in (lambda: decoder(model, given), lambda: init(object.__new__(zerodraft.DiffuSpec), given)):
        with pytest.raises(ZerodraftError, match=r"^A \w+ was given as the drafter: expected one of zerodraft's"):
            door()


@pytest.mark.parametrize("model", [None, "smollm2", torch.nn.Linear(2, 2), LlamaForCausalLM])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ZerodraftError, match=r"^A \w+ was given as the model: expected a loaded causal language model"):
        zerodraft.decoder(model)


def test_no_rows_are_no_prompt() -> None:
    model = model_of("llama")
    with pytest.raises(ZerodraftError, match="A prompt is empty"):
        zerodraft.decoder(model).generate(model, torch.zeros(0, 3, dtype=torch.long), **OPTIONS)


# -- kinds of drafters ------------------------------------------------------------------------------------------------


def test_every_kind_is_tried_here() -> None:
    assert {kind.name for kind in KINDS} == set(SAVED) == set(RECIPES)


@pytest.mark.parametrize("kind", SAVED)
def test_the_kind_is_recognised(kind: str, folders: dict[str, Path]) -> None:
    found = [each.name for each in KINDS if each.recognises(folders[kind])]
    # any model may be a causal one, if no other kind wants it
    assert found[0] == kind
    assert found[1:] in ([], ["autoregressive"])


@pytest.mark.parametrize(("ability", "able"), [(Judged, ["block", "dflash"]), (Exported, ["dflash"])])
@pytest.mark.parametrize("kind", SAVED)
def test_what_a_kind_cannot_do_is_said(kind: str, ability: Any, able: list[str], folders: dict[str, Path]) -> None:
    if kind in able:
        found, path = kind_that_can(ability, str(folders[kind]), "the command")
        assert (found.name, path) == (kind, folders[kind])
        return
    with pytest.raises(ZerodraftError, match=f"the command takes a {' or '.join(able)} drafter, such as"):
        kind_that_can(ability, str(folders[kind]), "the command")


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_kind_drafts_and_changes_no_text(kind: str, rows: int, target: Any, folders: dict[str, Path]) -> None:
    prompt = torch.randint(3, target.config.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(rows))
    plain = target.generate(prompt, **OPTIONS)
    decode = zerodraft.decoder(target, folders[kind], trace=True)
    decode.fallback = None
    assert isinstance(decode.drafter, HybridDrafter)
    assert torch.equal(decode.generate(target, prompt, **OPTIONS), plain)
    assert decode.last_stats is not None
    assert decode.last_stats.drafted > 0
    # by itself as well, at every step
    alone = zerodraft.decoder(target, decode.drafter.other, hybrid=False)
    alone.fallback = None
    assert torch.equal(alone.generate(target, prompt, **OPTIONS), plain)
    assert alone.last_stats is not None
    assert alone.last_stats.drafted > 20


@pytest.mark.parametrize("kind", SAVED)
def test_weights_that_are_torn_are_refused(kind: str, target: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / kind
    SAVED[kind](target, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ZerodraftError, match=kind):
        zerodraft.decoder(target, folder)


@pytest.mark.parametrize("kind", SAVED)
def test_a_configuration_that_is_torn_is_refused(kind: str, target: Any, tmp_path: Path) -> None:
    folder = tmp_path / kind
    SAVED[kind](target, folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ZerodraftError, match=r"config\.json"):
        zerodraft.decoder(target, folder)


@pytest.mark.parametrize("kind", ["block", "dflash"])
def test_a_drafter_that_reads_other_hidden_states_is_refused(kind: str, target: Any, folders: dict[str, Path]) -> None:
    config = type(target.config)(**(target.config.to_dict() | {"hidden_size": 16}))
    with pytest.raises(ZerodraftError, match=r"(?i)hidden|size|width"):
        zerodraft.decoder(LlamaForCausalLM(config), folders[kind])
