"""Rows: which are documents, which are left out, which are refused; and what of a conversation is learned."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.chat import tokens_of
from zerodraft.training.data import PackedBlocks, build_data, read_documents
from zerodraft.training.recipe import DataRecipe
from zerodraft.training.rows import Chat, Pair, content, document_of, plain_text
from zerodraft.training.tokenizer import train_tokenizer
from zerodraft.training.ztt.run import finetune, pretrain

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
ASKING = PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<end>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# as templates that leave out what was thought before earlier answers
REWRITING = ASKING.replace("m['content']", "(m['content'] if loop.last else m['content'][:1])")

TURNS = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": " A fox, naïve 🦊."},
    {"role": "user", "content": "And he?"},
    {"role": "assistant", "content": "\n\nNobody"},
]
RIGHT = (
    "<user>Who are you?<end>\n<assistant>{ A fox, naïve 🦊.<end>\n}<user>And he?<end>\n<assistant>{\n\nNobody<end>\n}"
)
"""What is in braces is learned."""


TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who are you? A fox. And he? Nobody <user> <assistant> <end>"], 300)


def chat(turns, prompt=0, tools=None):
    return Chat(json.dumps(turns), prompt, json.dumps(tools) if tools else "")


def marked_text(ids, learned, tokenizer):
    """The text with braces around what is learned, from bytes, since a token may be half a character."""
    pieces, inside = [], False
    for token, mark in zip(ids, learned, strict=True):
        if mark != inside:
            pieces.append("{" if mark else "}")
            inside = mark
        pieces.append(tokenizer.convert_ids_to_tokens(token))
    text = "".join([*pieces, "}" if inside else ""])
    return tokenizer.backend_tokenizer.decoder.decode([text])


@pytest.mark.parametrize("template", [ASKING, MARKED])
def test_the_assistants_tokens_are_those_counted_by_hand(tokenizer, template):
    tokenizer.chat_template = template
    ids, learned = tokens_of(chat(TURNS), tokenizer)
    assert ids == tokenizer(RIGHT.replace("{", "").replace("}", ""))["input_ids"]
    assert marked_text(ids, learned, tokenizer) == RIGHT
    if template == MARKED:
        theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
        assert ([*map(int, learned)], ids) == (theirs["assistant_masks"], theirs["input_ids"])


def test_a_conversation_that_is_a_prompt_is_not_learned(tokenizer):
    tokenizer.chat_template = ASKING
    ids, learned = tokens_of(chat(TURNS, 3), tokenizer)
    assert marked_text(ids, learned, tokenizer).endswith("he?<end>\n<assistant>{\n\nNobody<end>\n}")
    assert marked_text(ids, learned, tokenizer).count("{") == 1


@settings(deadline=None)
@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_of_a_pair_the_completion_and_its_end_are_learned(tokenizer, prompt, completion):
    ids, learned = tokens_of(Pair(prompt, completion), tokenizer)
    assert ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    first = learned.index(True)
    assert all(learned[first:])
    # the token at the border is learned if any of it is the completion's
    spoken = len(prompt.encode())
    sizes = np.cumsum([len(tokenizer.convert_ids_to_tokens(token)) for token in ids[:-1]])
    assert first == int((sizes <= spoken).sum())


def test_all_is_learned_where_that_is_asked(tokenizer):
    tokenizer.chat_template = REWRITING
    ids, learned = tokens_of(chat(TURNS), tokenizer, completion_only=False)
    assert all(learned)
    assert len(ids) == len(learned)
    assert all(tokens_of(Pair("a", "b"), tokenizer, completion_only=False)[1])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (REWRITING, "writes earlier turns in another way.*generation.*--data.no-completion-only-loss"),
        ("{{ raise_exception('no') }}", "refuses a conversation of user"),
    ],
)
def test_templates_that_do_not_do(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(ZerodraftError, match=message):
        tokens_of(chat(TURNS), tokenizer)


USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("template", [ASKING, MARKED])
@pytest.mark.parametrize("prompt", [0, 1])
def test_the_template_is_told_of_the_tools(tokenizer, template, prompt):
    told = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + template
    tokenizer.chat_template = told
    ids, learned = tokens_of(chat(TURNS[:2], prompt, TOOLS), tokenizer)
    bare, bare_learned = tokens_of(chat(TURNS[:2], prompt), tokenizer)
    text, bare_text = marked_text(ids, learned, tokenizer), marked_text(bare, bare_learned, tokenizer)
    assert text == "[search]" + bare_text
    assert content(chat(TURNS, 0, TOOLS)) != content(chat(TURNS))


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"text": "a", "messages": USER}, None, "a"),
        ({"text": None}, None, None),
        ({"text": "a\ud83d"}, None, "a\ufffd"),
        ({"messages": USER}, None, chat(USER)),
        ({"messages": [{**USER[0], "name": None}]}, None, chat(USER)),
        ({"messages": None}, None, None),
        ({"messages": []}, None, None),
        ({"prompt": "p", "completion": "c"}, None, Pair("p", "c")),
        ({"prompt": "", "completion": "c"}, None, Pair("", "c")),
        ({"prompt": "p", "completion": None}, None, None),
        ({"prompt": None, "completion": "c"}, None, None),
        ({"prompt": USER, "completion": USER}, None, chat(USER * 2, 1)),
        ({"prompt": USER, "completion": None}, None, None),
        ({"messages": USER, "tools": TOOLS}, None, chat(USER, tools=TOOLS)),
        ({"messages": USER, "tools": json.dumps(TOOLS)}, None, chat(USER, tools=TOOLS)),
        ({"messages": USER, "tools": None}, None, chat(USER)),
        ({"prompt": USER, "completion": USER, "tools": TOOLS}, None, chat(USER * 2, 1, TOOLS)),
        ({"q": "a", "n": 3, "x": 0.5}, "{q} {n} {x:.2f}", "a 3 0.50"),
        ({"q": "a", "b": None}, "{q} {b}", None),
        ({"q": {"r": "a"}}, "{q[r]}", "a"),
        ({"q": "a", "b": None}, "{q}", "a"),
    ],
)
def test_what_a_row_is(row, template, expected):
    assert document_of(row, DataRecipe(template=template), "a row of 'a.jsonl'") == expected


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"text": ["a", "b"]}, None, "a row of 'a.jsonl' has a list in 'text', expected a text"),
        ({"text": 5}, None, "a int in 'text'"),
        ({"txt": "a"}, None, r"no field 'text' \(did you mean 'txt'\?\)"),
        ({"prompt": "a"}, None, r"no field 'text' \(known: prompt\): name the field .* as data\.text_field"),
        ({"messages": USER, "tools": "search"}, None, "has a str in 'tools', expected a list of objects"),
        ({"messages": USER, "tools": ["search"]}, None, "has a list in 'tools'"),
        ({"messages": "a"}, None, "has a str in 'messages', expected a list of messages"),
        ({"messages": ["a"]}, None, "expected a list of messages"),
        ({"messages": [{"role": "user"}]}, None, "a message in 'messages' whose role or content is not a text"),
        ({"messages": [{"role": "user", "content": 5}]}, None, "is not a text"),
        ({"prompt": USER, "completion": "c"}, None, "has a str in 'completion'"),
        ({"prompt": "p", "completion": ["c"]}, None, "has a list in 'completion'"),
        ({"q": "a"}, "{q} {b}", r"no field 'b'"),
        ({"q": ["a"]}, "{q}", "a list, expected a text or a number"),
        ({"q": True}, "{q}", "a bool, expected"),
        ({"q": "a"}, "{q.__class__}", "a type, expected"),
        ({"q": "a"}, "{q", "cannot be filled"),
        ({"q": "a"}, "{}", "cannot be filled"),
        ({"q": "a"}, "{q:d}", "cannot be filled"),
        ({"q": "a"}, "{q[x]}", "data.template gets"),
    ],
)
def test_rows_that_are_refused(row, template, message):
    with pytest.raises(ZerodraftError, match=message):
        document_of(row, DataRecipe(template=template), "a row of 'a.jsonl'")


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"text": None}, {"text": "one"}, {"text": None}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    with caplog.at_level(logging.WARNING):
        assert read_documents((str(tmp_path / "a.jsonl"),), DataRecipe()) == ["one"]
    assert "are left out, 2 of them" in caplog.text
    (tmp_path / "a.jsonl").write_text('{"text": null}', encoding="utf-8")
    with pytest.raises(ZerodraftError, match="no text found"):
        read_documents((str(tmp_path / "a.jsonl"),), DataRecipe())


def test_documents_of_all_kinds_in_one_file(tmp_path, tokenizer):
    tokenizer.chat_template = ASKING
    rows = [{"text": "a b"}, {"messages": TURNS}, {"prompt": "p", "completion": "c"}] * 9
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = DataRecipe(cache=str(tmp_path / "cache"), context_length=8, validation_fraction=0)
    documents = read_documents((str(tmp_path / "a.jsonl"),), recipe)
    for _ in range(2):
        # the second time from the cache
        train = build_data(recipe, tokenizer, documents).train
        assert train.learned is not None
        ids = [token for block in train for token in block["input_ids"].tolist()]
        assert len(set(map(content, documents))) == 3
        labels = torch.stack([block["labels"] for block in train])
        assert set(labels[labels != -100].tolist()) <= set(ids)
        assert ((labels == -100).any(1) & (labels != -100).any(1)).any()
    every = build_data(replace(recipe, completion_only_loss=False), tokenizer, documents).train
    assert every.learned is None
    assert np.array_equal(every.tokens, train.tokens)


def test_blocks_without_a_token_to_predict_are_left_out():
    learned = np.zeros(40, bool)
    learned[[10, 25, 26]] = True
    blocks = PackedBlocks(np.arange(40), 10, learned=learned)
    # 10 begins its block, where nothing comes before it
    assert [block["input_ids"][0].item() for block in blocks] == [20]
    assert blocks[0]["labels"].tolist() == [-100] * 5 + [25, 26] + [-100] * 3


def test_too_few_documents_are_split_within(tmp_path, tokenizer, caplog):
    recipe = DataRecipe(cache=str(tmp_path / "cache"), context_length=8, validation_fraction=0.25)
    for count in (1, 2):
        caplog.clear()
        data = build_data(recipe, tokenizer, ["word " * 100] * count)
        assert data.validation is not None
        blocks = len(data.train) + len(data.validation)
        assert len(data.validation) == round(0.25 * blocks)
        assert int(data.validation.starts[0]) == int(data.train.starts[-1]) + 8
        assert "documents are too few to hold some back" in caplog.text
    short = build_data(recipe, tokenizer, ["abcdefgh"])
    assert (len(short.train), short.validation) == (1, None)
    assert "There is no validation" in caplog.text


def test_an_evaluation_text_that_nobody_has_is_left_out(tmp_path, tokenizer, caplog, monkeypatch):
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    recipe = DataRecipe(cache=str(tmp_path / "cache"), context_length=8, evaluation={"wiki": "$NOT_SET_ANYWHERE/a.txt"})
    assert build_data(recipe, tokenizer, ["word " * 100] * 9).evaluation == {}
    assert "data.evaluation.wiki is left out: the environment variable NOT_SET_ANYWHERE is not set" in caplog.text


def test_a_run_on_conversations_learns_the_answers(make_recipe, tmp_path):
    base = make_recipe("training.steps=2")
    pretrain(base, callbacks=[])
    rows = [{"messages": TURNS}] * 40
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = f"{base.output}/model"
    common = (f"model.start={model}", f"data.train=[{tmp_path / 'chats.jsonl'}]", f"output={tmp_path / 'tuned'}")
    with pytest.raises(ZerodraftError, match="has no chat template"):
        finetune(make_recipe(*common), callbacks=[])
    (tmp_path / "run" / "model" / "chat_template.jinja").write_text(ASKING, encoding="utf-8")
    results = finetune(make_recipe(*common, "training.steps=12", "training.accumulation=2"), callbacks=[])
    # a mean over the answers' tokens, of which there is no measure per byte
    assert results["evaluation"]["eval_validation_loss_2"] < 4
    assert "eval_validation_bits_per_byte" not in results["evaluation"]
    with pytest.raises(ZerodraftError, match="conversations, which need a chat template"):
        pretrain(make_recipe(*common[1:], f"output={tmp_path / 'new'}"), callbacks=[])


def test_plain_text_is_what_a_tokenizer_learns_from():
    assert (plain_text("a"), plain_text(Pair("a", "b"))) == ("a", "ab")
