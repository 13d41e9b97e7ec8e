"""What every kind of drafter that is a model in a directory keeps to: recognised, loaded, exact, and refused in one
sentence where it cannot be used. A new kind is a line in `SAVED`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import zerodraft
from tests.saved import save, save_block, save_dflash, save_target, tiny_tokenizer
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Drafter, Progress
from zerodraft.drafters.kinds import KINDS, Denoising, DrafterKind, Exported, Judged, kind_of, kind_that_can, load_kind
from zerodraft.drafters.masked_model import masked_from_target
from zerodraft.generate.drafters import find_drafter
from zerodraft.training.drafters.autoregressive import small_from_target
from zerodraft.training.drafters.kinds import RECIPES

SAVED: dict[str, Callable[[Any, Path], Any]] = {
    "masked": lambda target, path: masked_from_target(target, block_size=4).save_pretrained(path),
    "block": save_block,
    "dflash": save_dflash,
    "autoregressive": lambda target, path: save(small_from_target(target, 2), tiny_tokenizer(), path),
}
KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(target_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(target_folder).eval()


@pytest.fixture(scope="module")
def folders(target: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, write in SAVED.items():
        torch.manual_seed(1)
        made[name] = tmp_path_factory.mktemp(name)
        write(target, made[name])
    return made


def test_every_kind_is_here_and_can_be_trained() -> None:
    assert set(SAVED) == {kind.name for kind in KINDS} == set(RECIPES)
    assert {recipe.kind for recipe in RECIPES.values()} == set(RECIPES)


@KIND
def test_its_directory_is_recognised_as_it_alone(kind: DrafterKind, folders: dict[str, Path]) -> None:
    assert isinstance(kind, DrafterKind)
    assert kind_of(folders[kind.name]) is kind
    # the last one takes whatever the others do not
    assert {each.name for each in KINDS[:-1] if each.recognises(folders[kind.name])} == {kind.name} - {KINDS[-1].name}


@KIND
def test_what_is_loaded_is_a_drafter(
    kind: DrafterKind, folders: dict[str, Path], target_folder: Path, target: Any
) -> None:
    drafter, name = find_drafter(folders[kind.name], target, target_folder)
    assert isinstance(drafter, Drafter)
    assert name == folders[kind.name].name
    drafter.check(target.config)
    session = drafter.start(1, torch.device("cpu"), None)
    prompt = torch.tensor([[5, 9, 7, 11, 8]])
    states = target(prompt, output_hidden_states=True).hidden_states
    taps = torch.stack([states[i][0] for i in drafter.taps], 1)[:4] if len(drafter.taps) else None
    session.observe([Progress(prompt[0], taps)])
    (draft,) = session.propose([3])
    assert 1 <= len(draft) <= 3
    assert (draft.ids < target.config.vocab_size).all()
    assert (draft.log_q <= 1e-4).all()
    (nothing,) = session.propose([0])
    assert not len(nothing)


@KIND
@pytest.mark.parametrize("rows", [1, 2])
def test_the_door_writes_the_tokens_of_plain_decoding(
    kind: DrafterKind, folders: dict[str, Path], target: Any, rows: int
) -> None:
    prompt = torch.randint(target.config.vocab_size, (rows, 6), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(prompt, **settings)
    assert len(plain.unique()) > 4
    decode = zerodraft.decoder(target, folders[kind.name])
    assert torch.equal(target.generate(prompt, custom_generate=decode, **settings), plain)
    # a draft in every step, whatever drafts cost here
    decode = zerodraft.decoder(target, folders[kind.name], hybrid=False)
    decode.length, decode.fallback = FixedLength(3), None
    assert torch.equal(target.generate(prompt, custom_generate=decode, **settings), plain)
    assert decode.last_stats is not None
    assert decode.last_stats.drafted > decode.last_stats.steps


@KIND
def test_damaged_files_are_refused_in_one_sentence(
    kind: DrafterKind, target: Any, target_folder: Path, tmp_path: Path
) -> None:
    SAVED[kind.name](target, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ZerodraftError) as refused:
        load_kind(tmp_path, target, str(target_folder), Denoising())
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


@KIND
def test_a_target_of_another_size_is_refused(
    kind: DrafterKind, folders: dict[str, Path], target: Any, tmp_path: Path
) -> None:
    config = json.loads(json.dumps(target.config.to_dict())) | {"hidden_size": 16, "vocab_size": 900}
    torch.manual_seed(0)
    other = type(target)(type(target.config).from_dict(config)).eval()
    other_folder = save(other, tiny_tokenizer(), tmp_path)
    with pytest.raises(ZerodraftError) as refused:
        load_kind(folders[kind.name], other, str(other_folder), Denoising())
    assert "\n" not in str(refused.value)


@KIND
def test_denoising_is_refused_where_nothing_is_denoised(
    kind: DrafterKind, folders: dict[str, Path], target: Any, target_folder: Path
) -> None:
    many = Denoising(steps=2)
    if kind.denoises:
        assert load_kind(folders[kind.name], target, str(target_folder), many)
    else:
        with pytest.raises(ZerodraftError, match="2 denoising steps are for drafters that are masked diffusion models"):
            load_kind(folders[kind.name], target, str(target_folder), many)


@KIND
@pytest.mark.parametrize("ability", [Judged, Exported])
def test_abilities_that_it_lacks_are_refused_by_name(
    kind: DrafterKind, ability: Any, folders: dict[str, Path], target: Any, tmp_path: Path
) -> None:
    path = folders[kind.name]
    if not isinstance(kind, ability):
        able = " or ".join(each.name for each in KINDS if isinstance(each, ability))
        with pytest.raises(ZerodraftError, match=f"who takes a {able} drafter"):
            kind_that_can(ability, str(path), "who")
        return
    assert kind_that_can(ability, str(path), "who") == (kind, path)
    if ability is Judged:
        network = kind.network(path, target)  # pyright: ignore[reportAttributeAccessIssue]  # it is Judged
        assert isinstance(network, torch.nn.Module)
    else:
        facts = kind.export(path, tmp_path / "out", "transformers")  # pyright: ignore[reportAttributeAccessIssue]  # it is Exported
        assert kind_of(tmp_path / "out") is kind
        assert facts["parameters"] > 0
