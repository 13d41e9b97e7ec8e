"""The streamer gives every new token the depth of the position that predicted it, in every way of generating."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.ztt.tiny import tiny, tokens
from zerodraft import ConfidenceExit, ZerodraftError, ZeroMassExit
from zerodraft.models.caches import CACHE
from zerodraft.training.tokenizer import train_tokenizer
from zerodraft.ztt.streamer import DepthStreamer

RULE = ZeroMassExit(threshold=0.2)


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> tuple[DepthStreamer, torch.Tensor]:
    streamer = DepthStreamer(model)
    out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, streamer=streamer, **options)
    return streamer, out


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_depths_are_those_of_one_pass_over_the_text(options: dict[str, Any]) -> None:
    model, prompt = tiny("qwen3"), tokens(1, 6)
    streamer, out = generate(model, prompt, exit_rule=RULE, **options)
    whole = model(out, exit_rule=RULE).exit_depth[0]
    assert streamer.tokens == out[0, 6:].tolist()
    assert streamer.depths == whole[5:-1].tolist()
    assert len(set(streamer.depths)) > 1


def test_without_a_rule_every_token_has_the_depth_of_the_model() -> None:
    streamer, _ = generate(tiny("qwen3"), tokens(1, 6))
    assert streamer.depths == [3] * 12


def test_a_continued_generation_counts_from_its_own_positions() -> None:
    model, prompt = tiny("qwen3"), tokens(1, 6)
    whole, out = generate(model, prompt, exit_rule=RULE)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :-2], past_key_values=cache, use_cache=True, exit_rule=RULE)
    again, same = generate(model, prompt, **{CACHE: cache}, exit_rule=RULE)
    assert torch.equal(same, out)
    assert again.depths == whole.depths
    assert model.last_exit is not None
    assert model.last_exit[0, :4].tolist() == [0] * 4


def test_one_streamer_can_follow_several_texts() -> None:
    model, streamer = tiny("qwen3"), None
    streamer = DepthStreamer(model)
    for length in (4, 7):
        prompt = tokens(1, length, seed=length)
        out = model.generate(prompt, max_new_tokens=3, eos_token_id=None, streamer=streamer, exit_rule=RULE)
        assert streamer.tokens == out[0, length:].tolist()
        assert len(streamer.depths) == 3


def test_a_batch_is_refused_with_a_way_out() -> None:
    with pytest.raises(ZerodraftError, match=r"a batch of 2; read model\.last_exit"):
        generate(tiny("qwen3"), tokens(2, 4), exit_rule=ConfidenceExit(threshold=0.5))


def test_text_comes_in_whole_characters_with_the_depth_of_their_last_token() -> None:
    tokenizer = train_tokenizer(["plain words only, plain words"], 300)
    text = "plain wörds — 日本 only"
    ids = tokenizer(text)["input_ids"]
    model, pieces = tiny("llama"), []
    streamer = DepthStreamer(model, tokenizer, lambda piece, depth: pieces.append((piece, depth)))
    depths = torch.arange(len(ids) + 1) % 3 + 1
    model.last_exit = depths[None]
    streamer.put(torch.tensor([[5]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.put(torch.tensor([tokenizer.eos_token_id]))
    streamer.end()
    assert "".join(piece for piece, _ in pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece and piece for piece, _ in pieces)
    last_token_of = [len(tokenizer(text[:end])["input_ids"]) - 1 for end in range(1, len(text) + 1)]
    position = -1
    for piece, depth in pieces:
        position += len(piece)
        assert depth == depths[last_token_of[position]]


def test_a_text_that_ends_within_a_character_is_written_at_the_end() -> None:
    tokenizer = train_tokenizer(["plain"], 260)
    pieces: list[tuple[str, int]] = []
    streamer = DepthStreamer(tiny("llama"), tokenizer, lambda piece, depth: pieces.append((piece, depth)))
    streamer.put(torch.tensor([[5]]))
    for token in tokenizer("a日")["input_ids"][:-1]:
        streamer.put(torch.tensor([token]))
    assert [piece for piece, _ in pieces] == ["a"]
    streamer.end()
    assert "".join(piece for piece, _ in pieces).startswith("a\N{REPLACEMENT CHARACTER}")


def test_tokenizer_and_callback_belong_together() -> None:
    with pytest.raises(ZerodraftError, match="together"):
        DepthStreamer(tiny("llama"), on_text=lambda piece, depth: None)
