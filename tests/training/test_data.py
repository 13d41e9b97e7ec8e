"""Data: formats, splitting, caching and packing are functions of the content alone."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.data import PackedBlocks, build_data, cut_document, pack_texts, read_documents, split_documents
from zerodraft.training.recipe import DataRecipe
from zerodraft.training.tokenizer import train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "seven", "wizards", "box"]


def make_text(seed, words=300):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_text(seed) for seed in range(5)], 300)


@pytest.fixture
def recipe(tmp_path):
    return DataRecipe(cache=str(tmp_path / "cache"), context_length=16, validation_fraction=0.2)


def test_tokenizer_round_trip(tokenizer, tmp_path):
    text = "the quick brown fox, naïve 🦊\n\n  and\ttabs"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) == len(tokenizer) <= 300
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert loaded("<|eos|>")["input_ids"] == [loaded.eos_token_id]


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ZerodraftError, match="at least 259"):
        train_tokenizer(["text"], 100)
    with pytest.raises(ZerodraftError, match="There is no model directory"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ZerodraftError, match=r"There is no tokenizer in .*: expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_formats(tmp_path, recipe):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo", encoding="utf-8")
    rows = [{"text": "three\u2028still three", "label": "x"}, {"text": "four", "label": "y"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": ["five"], "label": ["z"]})
    parquet.write_table(table, tmp_path / "c.parquet")
    assert read_documents((str(tmp_path / "*.txt"),), recipe) == ["one\n\n\ntwo"]
    assert read_documents((str(tmp_path / "a.txt"),), replace(recipe, separator="\n\n\n")) == ["one", "two"]
    assert read_documents((str(tmp_path),), recipe)[1:] == ["three\u2028still three", "four", "five"]
    (tmp_path / "more").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "more" / "A.TXT")
    (tmp_path / "b.jsonl").rename(tmp_path / "more" / "b.JSONL")
    for source in (tmp_path / "more", tmp_path / "more" / "*"):
        assert read_documents((str(source),), recipe) == ["one\n\n\ntwo", "three\u2028still three", "four"]
    shown = replace(recipe, template="{label}: {text}")
    assert read_documents((str(tmp_path / "c.parquet"),), shown) == ["z: five"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("books", r"no data at 'books'"),
        ("$NOT_SET_ANYWHERE/a.txt", "environment variable NOT_SET_ANYWHERE is not set"),
        ("bok.txt", r"did you mean 'book\.txt'"),
        ("book.doc", "unknown format"),
        ("pictures", r"no data in the folder 'pictures': expected files in one of \.txt"),
        ("rows.jsonl", r"'rows\.jsonl' line 3 has a int in 'text'"),
        ("bad.jsonl", r"line 1 is not JSON"),
        ("list.jsonl", "must be an object"),
        ("fields.jsonl", r"has no field 'text' \(did you mean 'texts'\?\)"),
        ("empty.txt", "no text found"),
    ],
)
def test_errors(tmp_path, monkeypatch, recipe, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": 1}\n', encoding="utf-8")
    contents = {"book.txt": "x", "book.doc": "x", "bad.jsonl": "{", "list.jsonl": "[1]", "empty.txt": " \n"}
    for name, content in {**contents, "fields.jsonl": '{"texts": 1}'}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ZerodraftError, match=message):
        read_documents((source,), recipe)


@pytest.mark.parametrize(
    ("name", "message"), [("a.txt", "not UTF-8"), ("a.jsonl", "not UTF-8"), ("a.parquet", "not a complete parquet")]
)
def test_damaged_files(tmp_path, recipe, name, message):
    (tmp_path / name).write_bytes(b"PAR1\xff\xfe\xe4")
    with pytest.raises(ZerodraftError, match=message):
        read_documents((str(tmp_path / name),), recipe)


def test_no_sources(recipe):
    with pytest.raises(ZerodraftError, match=r"data\.train is empty"):
        read_documents((), recipe)


@settings(deadline=None)
@given(st.lists(st.text("ab \n", max_size=60), max_size=20), st.integers(1, 50))
def test_cutting_loses_nothing_but_blanks(paragraphs, chars):
    document = "\n\n".join(paragraphs)
    pieces = list(cut_document(document, chars))
    assert "".join("".join(pieces).split()) == "".join(document.split())
    assert all(piece == piece.strip() and piece for piece in pieces)


def test_split_depends_on_content_only():
    documents = [make_text(seed, 5) for seed in range(400)]
    train, validation = split_documents(documents, 0.25)
    assert sorted(train + validation) == sorted(documents)
    assert 60 < len(validation) < 140
    assert split_documents(documents[::-1], 0.25) == (train, validation)
    # more files change neither the side nor the relative order of those that were there
    more_train, _ = split_documents([*documents, "something else"], 0.25)
    assert [text for text in more_train if text != "something else"] == train
    with pytest.raises(ZerodraftError, match="validation_fraction"):
        split_documents(documents, 1.0)


def test_packing_and_cache(tokenizer, recipe, tmp_path):
    documents = [make_text(seed, 40) for seed in range(20)]
    data = build_data(recipe, tokenizer, documents)
    train, _ = split_documents(documents, recipe.validation_fraction)
    stream = [i for text in train for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = [data.train[i]["input_ids"] for i in range(len(data.train))]
    assert torch.cat(blocks).tolist() == stream[: len(blocks) * 16]
    assert len(stream) - len(blocks) * 16 < 16
    assert torch.equal(data.train[0]["labels"], data.train[0]["input_ids"])
    folders = sorted(p.name for p in (tmp_path / "cache").iterdir())
    again = build_data(recipe, tokenizer, documents)
    assert isinstance(again.train.tokens, np.memmap)
    assert np.array_equal(again.train.tokens, data.train.tokens)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == folders


def test_tokens_are_kept_in_the_cache_directory(recipe, tokenizer, tmp_path, monkeypatch):
    documents = [make_text(seed, 40) for seed in range(20)]
    monkeypatch.setenv("ZERODRAFT_CACHE", str(tmp_path / "mine"))
    build_data(recipe, tokenizer, documents)
    build_data(replace(recipe, cache=None), tokenizer, documents)
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {p.name for p in (tmp_path / "cache").iterdir()}


def test_limited_evaluation_spans_the_text():
    blocks = PackedBlocks(np.arange(1000, dtype=np.uint16), 10, limit=5)
    assert [int(blocks[i]["input_ids"][0]) for i in range(len(blocks))] == [0, 200, 400, 600, 800]
    assert blocks.rows().shape == (5, 10)
    assert blocks.rows(2)[:, 0].tolist() == [0, 400]


def test_texts_that_are_read_once_become_the_blocks_of_a_run(tokenizer, recipe):
    documents = [make_text(seed) for seed in range(3)]
    train = build_data(replace(recipe, validation_fraction=0.0), tokenizer, documents).train
    packed = pack_texts(documents[::-1], tokenizer, 16, limit=4)
    assert sorted(packed.tokens) == sorted(train.tokens)
    assert (len(packed), packed.rows().shape) == (4, (4, 16))


def test_too_little_text(tokenizer, recipe):
    with pytest.raises(ZerodraftError, match="fewer than one block"):
        build_data(replace(recipe, validation_fraction=0.0, context_length=4096), tokenizer, ["short"])


def test_hub_data_sets(recipe, tmp_path, monkeypatch):
    """A local folder in the hub's layout, which the same library call loads; no hub is asked."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    (tmp_path / "stories").mkdir()
    rows = [{"text": make_text(seed, 20), "title": str(seed)} for seed in range(4)]
    (tmp_path / "stories" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"hub:{tmp_path / 'stories'}"
    assert read_documents((source,), recipe) == [row["text"] for row in rows]
    titled = read_documents((source,), replace(recipe, template="{title}: {text}"))
    assert titled == [f"{row['title']}: {row['text']}" for row in rows]
    with pytest.raises(ZerodraftError, match=r"no field 'txt'.*text"):
        read_documents((source,), replace(recipe, text_field="txt"))
    with pytest.raises(ZerodraftError, match="could not be loaded"):
        read_documents((source,), replace(recipe, hub_split="validation"))
