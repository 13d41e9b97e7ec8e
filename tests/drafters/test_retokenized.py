"""Drafts through the text: whatever the two tokenizers are and wherever the text was cut, drafts go on with it."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Drafter, Progress
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.retokenized import (
    RetokenizedDrafter,
    continuation,
    decode,
    different_tokenizers,
    retokenized_if_needed,
    spread,
)
from zerodraft.generate.drafters import find_drafter
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.training.tokenizer import train_tokenizer

CPU = torch.device("cpu")
CORPUS = [
    "The cat sat on the mat, and the other cats sat there too.",
    "Strawberries are berries; blueberries as well. 12 + 34 = 46!",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Où est le café? – naïve déjà vu 🙂🙃 …",
] * 3
PLAIN = [text for text in CORPUS if text.isascii() and "\n" not in text]


def metaspace() -> PreTrainedTokenizerFast:
    """As in SentencePiece: words begin with a mark that is also put before the text, and a token goes before all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]  # stub
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")  # type: ignore[assignment]  # stub
    tokenizer.train_from_iterator(PLAIN, trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"]))  # type: ignore[call-arg]  # stub
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"few": train_tokenizer(CORPUS, 270), "many": train_tokenizer(CORPUS, 420), "words": metaspace()}
ANY = st.text(st.sampled_from("aetcs T.,1\n é🙂…"), max_size=30).map(lambda text: "The cat" + text)
ASCII = st.text(st.sampled_from("aetcs T.,1"), max_size=30).map(lambda text: "The" + " ".join(f" {text}".split(" ")))


class Knowing:
    """A drafter that knows the whole text, in its own tokens."""

    taps: Sequence[int] = ()
    max_length = 200

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.known: list[int] = []

    def check(self, config: Any) -> None:
        """Fits everything."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "Knowing":
        self.known = []
        return self

    def observe(self, progress: Sequence[Progress]) -> None:
        self.known += progress[0].tokens.tolist()

    def rewind(self, row: int, length: int) -> None:
        del self.known[length:]

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        said = decode(self.tokenizer, self.known)
        if not self.text.startswith(said):
            return [Lattice.empty()]
        rest, _ = continuation(self.tokenizer, self.known, self.text[len(said) :])
        ids = np.array([*rest, self.tokenizer.eos_token_id][: lengths[0]], np.int64)
        return [Lattice(ids[:, None], np.full((len(ids), 1), -0.5, np.float32), chain=True)]


def progress(tokens: Sequence[int]) -> list[Progress]:
    return [Progress(torch.tensor(tokens, dtype=torch.long), None)]


def encoded(tokenizer: Any, *parts: str) -> list[int]:
    """A text in parts that were tokenized apart, as models may well write it."""
    return [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]


PAIRS = [("few", "many", ANY), ("many", "few", ANY), ("words", "many", ASCII), ("few", "words", ASCII)]


@pytest.mark.parametrize(("own", "target", "texts"), PAIRS, ids=lambda value: value if isinstance(value, str) else "")
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_the_drafter_knows_arrives(own: str, target: str, texts: Any, data: st.DataObject) -> None:
    """From any token of a text on, cut in parts anywhere, a drafter that knows the text drafts the rest of it."""
    text = data.draw(texts)
    theirs = TOKENIZERS[target]
    cut = data.draw(st.integers(1, len(text)))
    tokens = encoded(theirs, text) if target == "words" else encoded(theirs, text[:cut], text[cut:])
    known = tokens[: data.draw(st.integers(1, len(tokens)))]
    text = decode(theirs, tokens)
    session = RetokenizedDrafter(Knowing(TOKENIZERS[own], text), TOKENIZERS[own], theirs).start(1, CPU, None)
    session.observe(progress(known))
    # how many of the drafter's tokens that takes is estimated from what is known, which may be two tokens
    (lattice,) = session.propose([120])
    assert lattice.chain
    drafted = lattice.ids[:, 0].tolist()
    complete = not decode(theirs, known).endswith("\ufffd")
    if complete or drafted:
        assert decode(theirs, known + drafted) == text
        assert drafted[-1] == theirs.eos_token_id
        assert lattice.log_q.sum() <= 0
    wanted = data.draw(st.integers(1, 4))
    (short,) = session.propose([wanted])
    assert len(short) <= wanted
    assert text.startswith(decode(theirs, known + short.ids[:, 0].tolist()).rstrip("\ufffd"))


def test_drafts_are_the_targets_own_tokens() -> None:
    """Where the target's text is cut as its tokenizer cuts, the draft is exactly its next tokens, for every length."""
    few, many = TOKENIZERS["few"], TOKENIZERS["many"]
    text = CORPUS[0]
    for own, target in ((few, many), (many, few)):
        tokens = encoded(target, text)
        for at in range(1, len(tokens)):
            for length in (1, 2, 5):
                session = RetokenizedDrafter(Knowing(own, text), own, target).start(1, CPU, None)
                session.observe(progress(tokens[:at]))
                drafted = session.propose([length])[0].ids[:, 0].tolist()
                # one of the drafter's tokens too few may cut the last token short
                sure = drafted[:-1] if len(drafted) < length else drafted
                assert len(sure) >= min(length, len(tokens) - at) - 3
                if decode(target, tokens[:at]).endswith((" ", ".", "t", "e")) and target is few:
                    assert sure[: len(tokens) - at] == tokens[at : at + len(sure)]


def test_bytes_of_a_character_come_back() -> None:
    few = TOKENIZERS["few"]
    text = "The cat 🙃 sat"
    tokens = encoded(few, text)
    inside = next(i for i in range(1, len(tokens)) if decode(few, tokens[:i]).endswith("\ufffd"))
    session = RetokenizedDrafter(Knowing(TOKENIZERS["many"], text), TOKENIZERS["many"], few).start(1, CPU, None)
    session.observe(progress(tokens[:inside]))
    assert session.propose([30])[0].ids[:, 0].tolist() == [*tokens[inside:], few.eos_token_id]


def test_a_token_over_the_border_of_two_characters_is_not_cut_in_two() -> None:
    """`many` has learnt one, and what it leaves of the first character is as long as the character."""
    tokenizer, text = TOKENIZERS["many"], "The cat🙂"
    assert [decode(tokenizer, [token]) for token in encoded(tokenizer, "🙂🙂")] == ["\ufffd", "\ufffd\ufffd", "\ufffd"]
    tokens, _ = continuation(tokenizer, encoded(tokenizer, text), "🙂")
    assert decode(tokenizer, [*encoded(tokenizer, text), *tokens]) == text + "🙂"


def test_log_probabilities_keep_their_sum() -> None:
    log_q = np.array([-1.0, -2.0, -4.0], np.float32)
    assert spread(log_q, [0, 3, 5], [0, 1, 4]).tolist() == [-1.0, -2.0, -4.0]
    assert spread(log_q, [0, 3, 5], [0, 5]).tolist() == [-3.0, -4.0]
    assert spread(log_q, [0, 3, 5], [0]).tolist() == [-7.0]
    assert spread(log_q[:0], [], [0, 2]).tolist() == [0.0, 0.0]


def model(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@settings(deadline=None, max_examples=10)
@given(texts=st.lists(ANY, min_size=2, max_size=4), length=st.integers(1, 5))
def test_going_back_drafts_as_from_scratch(texts: list[str], length: int) -> None:
    """A session that is told a text in pieces, its end encoded anew each time, drafts what a new one drafts."""
    drafter = AutoregressiveDrafter(DRAFTER, max_length=6)
    wrapped = RetokenizedDrafter(drafter, TOKENIZERS["few"], TOKENIZERS["many"])
    session, known = wrapped.start(1, CPU, None), []
    for text in texts:
        piece = encoded(TOKENIZERS["many"], text)
        known += piece
        session.observe(progress(piece))
        (lattice,) = session.propose([length])
        anew = wrapped.start(1, CPU, None)
        anew.observe(progress(known))
        (expected,) = anew.propose([length])
        assert np.array_equal(lattice.ids, expected.ids)
        assert np.allclose(lattice.log_q, expected.log_q, atol=1e-4)


DRAFTER, TARGET = model(TOKENIZERS["few"], 0), model(TOKENIZERS["many"], 1)
HOW: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


def test_greedy_tokens_are_those_of_plain_decoding() -> None:
    wrapped = RetokenizedDrafter(AutoregressiveDrafter(DRAFTER), TOKENIZERS["few"], TOKENIZERS["many"])
    assert isinstance(wrapped, Drafter)
    inputs = TOKENIZERS["many"](["The cat", "Strawberries é"], return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    plain = TARGET.generate(**inputs, **HOW)
    assert torch.equal(TARGET.generate(**inputs, **HOW, custom_generate=DiffuSpec(wrapped)), plain)


def test_texts_end_where_the_model_or_its_tokenizer_says() -> None:
    small = model(TOKENIZERS["few"], 0)
    small.generation_config.eos_token_id = [3, 4]
    own: Any = TOKENIZERS["few"].eos_token_id
    for drafter, ends in ((AutoregressiveDrafter(small), {3, 4, own}), (Knowing(TOKENIZERS["few"], ""), {own})):
        assert RetokenizedDrafter(drafter, TOKENIZERS["few"], TOKENIZERS["many"]).eos_ids == ends


def test_a_drafter_that_knows_saves_steps() -> None:
    prompt = TOKENIZERS["many"]("The cat sat", return_tensors="pt")["input_ids"]
    how = HOW | {"eos_token_id": None, "pad_token_id": 0}
    plain = TARGET.generate(prompt, **how)
    text = decode(TOKENIZERS["many"], plain[0].tolist()).rstrip("\ufffd")
    knowing = Knowing(TOKENIZERS["few"], text)
    spec = DiffuSpec(RetokenizedDrafter(knowing, TOKENIZERS["few"], TOKENIZERS["many"]), length=FixedLength(6))
    assert torch.equal(TARGET.generate(prompt, **how, custom_generate=spec), plain)
    assert spec.last_stats is not None
    assert spec.last_stats.mat > 1


def test_drafters_that_cannot_be_wrapped_are_refused() -> None:
    few, many = TOKENIZERS["few"], TOKENIZERS["many"]
    reads = Knowing(few, "")
    reads.taps = (1,)
    with pytest.raises(ZerodraftError, match="reads the target's hidden states"):
        RetokenizedDrafter(reads, few, many)
    wrapped = RetokenizedDrafter(PromptLookupDrafter(), few, many)
    wrapped.check(TARGET.config)
    with pytest.raises(ZerodraftError, match="more tokens than the 270"):
        wrapped.check(DRAFTER.config)


def test_tokenizers_are_compared_by_their_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not by their number; only of added tokens may one have more, where that is asked for."""
    with_mask, moved, other = (copy.deepcopy(TOKENIZERS["few"]) for _ in range(3))
    with_mask.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    moved.add_tokens(["<|x|>", "<|mask|>"])
    other = train_tokenizer([text[::-1] for text in CORPUS], len(other))
    assert len(other) == len(TOKENIZERS["few"])
    folders = {"few": TOKENIZERS["few"], "with_mask": with_mask, "moved": moved, "other": other}
    for name, tokenizer in folders.items():
        tokenizer.save_pretrained(tmp_path / name)

    def differ(a: str, b: str, **options: bool) -> bool:
        return different_tokenizers(tmp_path / a, tmp_path / b, **options) is not None

    assert not differ("few", "few")
    assert differ("few", "other")
    assert differ("few", "other", added=False)
    assert differ("with_mask", "few")
    assert not differ("with_mask", "few", added=False)
    assert differ("with_mask", "moved", added=False)
    assert not caplog.records
    # of this family transformers would make a tokenizer out of nothing
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen2"}')
    assert not differ("bare", "few")
    assert f"no tokenizer could be loaded from '{tmp_path / 'bare'}'" in caplog.text


def test_the_tokenizer_of_dream_is_read_without_its_code(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {"4": {"content": "<|mask|>", "special": True}},
        "eos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    TOKENIZERS["few"].save_pretrained(tmp_path / "target")
    pair = different_tokenizers(tmp_path, tmp_path / "target", added=False)
    assert pair is not None
    assert pair[0]("abba<|mask|>")["input_ids"] == [2, 1, 0, 4]
    assert pair[0].is_fast


def test_the_command_wraps_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = {"target": (TARGET, "many"), "drafter": (DRAFTER, "few"), "bare": (DRAFTER, None)}
    for name, (network, tokenizer) in folders.items():
        network.save_pretrained(tmp_path / name)
        if tokenizer:
            TOKENIZERS[tokenizer].save_pretrained(tmp_path / name)
    drafter, name = find_drafter(str(tmp_path / "drafter"), TARGET, str(tmp_path / "target"))
    assert isinstance(drafter, RetokenizedDrafter)
    assert name == "drafter"
    same = AutoregressiveDrafter(DRAFTER)
    assert retokenized_if_needed(same, tmp_path / "target", tmp_path / "target") is same
    assert retokenized_if_needed(same, tmp_path / "bare", tmp_path / "target") is same
    assert not caplog.records[1:]
    # without a tokenizer its tokens are taken to be the target's, which is said
    drafter, _ = find_drafter(str(tmp_path / "bare"), TARGET, str(tmp_path / "target"))
    assert isinstance(drafter, AutoregressiveDrafter)
    assert f"no tokenizer could be loaded from '{tmp_path / 'bare'}'" in caplog.records[1].message
