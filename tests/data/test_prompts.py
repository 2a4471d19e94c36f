"""The stream of prompts: order, mix, filters, position, ranks."""

import json

import pytest
import torch

from dgrpo.data import PromptStream, Source, render_row
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.text import BadRow, encode_text
from dgrpo.trainer.config import Data


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(vocab_size=300, names=0)


def rows(n, letter="a"):
    return [
        {"id": f"{letter}{i}", "prompt": f"{letter} {i}", "completion": str(i)} for i in range(n)
    ]


def stream(tokenizer, *sources, log=lambda line: None, **options):
    known = {name: options.pop(name) for name in Data.model_fields.keys() & options.keys()}
    return PromptStream(Data(sources=list(sources), **known), tokenizer, log=log, **options)


def drain(prompts, n=5):
    found = []
    while batch := prompts.batch(n):
        found += batch
    return found


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_an_epoch_is_every_row_once_in_another_order(tokenizer):
    found = ids(drain(stream(tokenizer, Source(rows=rows(20)), epochs=2)))
    first, second = found[:20], found[20:]
    assert sorted(first) == sorted(second) == sorted(r["id"] for r in rows(20))
    assert first != second and first != [r["id"] for r in rows(20)]


def test_order_is_fixed_by_the_seed(tokenizer):
    orders = [ids(drain(stream(tokenizer, Source(rows=rows(20)), seed=s))) for s in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffle_rows_come_as_they_are(tokenizer):
    found = ids(drain(stream(tokenizer, Source(rows=rows(7)), shuffle=False)))
    assert found == [r["id"] for r in rows(7)]


def test_mix_is_exact_in_every_prefix_and_ends_with_the_first_source(tokenizer):
    long, short = Source(rows=rows(90), weight=9), Source(rows=rows(3, "b"), weight=1)
    found = ids(drain(stream(tokenizer, long, short)))
    assert sum(i[0] == "a" for i in found) == 90
    for n in range(1, len(found) + 1):
        assert abs(sum(i[0] == "b" for i in found[:n]) - n / 10) <= 1


def test_prompt_holds_tokens_target_and_columns(tokenizer):
    row = {"document": "D <|end|>", "question": "Q?", "answer": "A", "aliases": ["A"]}
    prompt = stream(tokenizer, Source(rows=[row], name="s", reward="m:f")).batch(1)[0]
    assert prompt.text == "D <|end|>\n\nQ?"
    assert prompt.ids.tolist() == encode_text(tokenizer, prompt.text)
    assert tokenizer.eos_token_id not in prompt.ids
    assert prompt.completion == "A"
    assert prompt.completion_ids.tolist() == [*encode_text(tokenizer, "A"), tokenizer.eos_token_id]
    assert prompt.columns["aliases"] == ["A"] and prompt.columns["reward"] == "m:f"
    assert (prompt.source, prompt.index, prompt.ids.dtype) == ("s", 0, torch.int64)


def test_segments_carry_loss_on_their_answers_each_ended(tokenizer):
    pieces = [("doc?a", False), ("1", True), ("?b", False), ("22", True)]
    row = {"segments": [{"text": text, "loss": loss} for text, loss in pieces]}
    prompt = stream(tokenizer, Source(rows=[row])).batch(1)[0]
    end = [tokenizer.eos_token_id]
    assert prompt.ids.tolist() == encode_text(tokenizer, "doc?a")
    answers = encode_text(tokenizer, "1") + end, encode_text(tokenizer, "22") + end
    asked = encode_text(tokenizer, "?b")
    assert prompt.completion_ids.tolist() == answers[0] + asked + answers[1]
    assert prompt.completion_ids[prompt.loss_mask].tolist() == answers[0] + answers[1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c", "answer": "a"}, ("p", "c")),
        ({"prompt": "p", "response_b": "b", "response_a": None, "answer": "a"}, ("p", "b")),
        ({"document": "d", "question": "q", "answer": "a"}, ("d\n\nq", "a")),
        ({"document": "{d}", "question": "q"}, ("{d}\n\nq", None)),
    ],
)
def test_where_prompt_and_target_come_from(row, expected):
    assert render_row(row, Source()) == expected


def test_the_assistants_last_turn_is_the_target():
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "t"}]
    assert render_row({"messages": chat}, Source()) == (chat[:1], "t")


def test_a_null_document_says_why():
    with pytest.raises(BadRow, match=r"document is null.*Institutional Books.*books=FOLDER"):
        render_row({"id": "x", "document": None, "question": "q"}, Source())


def test_chat_template_and_system_message(tokenizer):
    chat = train_tokenizer(300, 0)
    chat.chat_template = (
        "{% for m in messages %}<|pad|>{{ m['role'] + m['content'] }}{% endfor %}<|pad|>"
        "{{ 'thinking' if thinking else '' }}"
    )
    options = {"system": "S", "chat_options": {"thinking": True}}
    prompt = stream(chat, Source(rows=rows(1)), **options).batch(1)[0]
    assert chat.decode(prompt.ids) == "<|pad|>systemS<|pad|>usera 0<|pad|>thinking"
    plain = stream(chat, Source(rows=rows(1)), chat=False).batch(1)[0]
    assert chat.decode(plain.ids) == "a 0"
    with pytest.raises(ValueError, match="chat_template"):
        stream(tokenizer, Source(rows=rows(1)), chat=True)


def test_lengths_are_filtered_counted_and_told(tokenizer):
    lines = []
    texts = [{"id": str(n), "prompt": "?" * n, "completion": "!" * n} for n in (1, 5, 9, 20)]
    prompts = stream(
        tokenizer,
        Source(rows=texts, name="s"),
        min_prompt_tokens=2,
        max_prompt_tokens=10,
        max_completion_tokens=9,
        log=lines.append,
    )
    assert ids(drain(prompts)) == ["5"]
    assert prompts.report.counts == {"too short": 1, "too long": 1, "target too long": 1}
    assert any("s:3" in line and "20 tokens, at most 10" in line for line in lines)


def test_bad_rows_are_dropped_not_fatal(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    bad = ["{", '{"x": 1}', '{"prompt": 3}', '{"prompt": [{"role": "user"}]}', '{"prompt": [1]}']
    bad += ['{"prompt": "half a character: \\ud800"}']
    file.write_text("\n".join([*bad, '{"prompt": "p", "completion": "c"}']))
    prompts = stream(tokenizer, Source(path=str(file)))
    assert len(drain(prompts)) == 1
    assert prompts.report.dropped == 6 and prompts.report.kept == 1


def test_rows_that_a_template_or_a_reader_refuses_are_dropped(tokenizer):
    class Reader(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("disk")
            return super().__getitem__(index)

    chat = train_tokenizer(300, 0)
    chat.chat_template = (
        "{% if messages[0].content == 'a 0' %}{{ raise_exception('no') }}{% endif %}x"
    )
    prompts = stream(chat, Source(rows=Reader(rows(4))))
    assert len(drain(prompts)) == 2
    assert prompts.report.counts == {"malformed row": 1, "unreadable row": 1}


def test_targets_can_be_required(tokenizer):
    prompts = stream(tokenizer, Source(rows=[{"prompt": "p"}, *rows(1)]), require_completion=True)
    assert len(drain(prompts)) == 1 and prompts.report.counts == {"no target": 1}


def test_where_keeps_some_rows_without_counting_the_rest(tokenizer):
    prompts = stream(tokenizer, Source(rows=rows(5), where={"id": "a3"}))
    assert ids(drain(prompts)) == ["a3"] and prompts.report.dropped == 0


def test_a_source_without_a_usable_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"no usable row(.|\n)*2 too long"):
        drain(stream(tokenizer, Source(rows=rows(2)), max_prompt_tokens=1, epochs=None))


def long_and_short(tmp_path, streaming):
    for i in range(3):
        lines = [json.dumps(row) for row in rows(300, f"l{i}-")]
        (tmp_path / f"{i}.jsonl").write_text("\n".join([*lines, "{"]))
    long = Source(path=str(tmp_path), name="long", weight=0.9, streaming=streaming)
    return long, Source(rows=rows(7, "s"), name="short", weight=0.1)


@pytest.mark.parametrize("streaming", [False, True], ids=["random access", "streaming"])
@pytest.mark.parametrize("stop", [0, 3, 130, 900, 1010])
def test_resumes_bitwise(tokenizer, tmp_path, streaming, stop):
    sources = long_and_short(tmp_path, streaming)
    whole = stream(tokenizer, *sources, epochs=2)
    expected = ids(drain(whole, 10))
    assert len({i for i in expected if i[0] == "l"}) == 900 and len(expected) == 2000
    first = stream(tokenizer, *sources, epochs=2)
    taken = ids(first.batch(stop))
    state = json.loads(json.dumps(first.state_dict()))
    second = stream(tokenizer, *sources, epochs=2)
    second.load_state_dict(state)
    rest = drain(second, 10)
    assert taken + ids(rest) == expected
    assert [p.index for p in rest] == list(range(stop, 2000))
    assert second.report.counts == whole.report.counts == {"bad JSON": 6}


@pytest.mark.parametrize("streaming", [False, True], ids=["random access", "streaming"])
def test_ranks_share_the_stream_and_resume_on_another_number(tokenizer, tmp_path, streaming):
    sources = long_and_short(tmp_path, streaming)
    expected = [ids(stream(tokenizer, *sources).batch(n)) for n in (8, 20)]
    parts = [stream(tokenizer, *sources, rank=r, world=2) for r in range(2)]
    halves = [part.batch(8) for part in parts]
    assert sorted(p.index for half in halves for p in half) == list(range(8))
    assert [i for pair in zip(*map(ids, halves), strict=True) for i in pair] == expected[0]
    state = parts[0].state_dict()
    assert state == parts[1].state_dict()
    later = [stream(tokenizer, *sources, rank=r, world=3) for r in range(3)]
    for part in later:
        part.load_state_dict(state)
    found = sorted((p for part in later for p in part.batch(12)), key=lambda p: p.index)
    assert ids(found) == expected[1][8:]


def test_a_position_of_other_data_is_refused(tokenizer):
    state = stream(tokenizer, Source(rows=rows(5), name="a")).state_dict()
    with pytest.raises(ValueError, match="saved position is of"):
        stream(tokenizer, Source(rows=rows(5), name="b")).load_state_dict(state)
    with pytest.raises(ValueError, match="had 5 when"):
        stream(tokenizer, Source(rows=rows(6), name="a")).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "sources: got none"),
        ({"sources": [Source(rows=rows(1))], "rank": 2}, "rank: got 2"),
    ],
)
def test_wrong_arguments(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        PromptStream(Data(sources=options.pop("sources")), tokenizer, **options)


def test_a_source_without_weight_raises():
    with pytest.raises(ValueError, match="weight\n.*greater than 0.*input_value=0"):
        Source(rows=rows(1), weight=0)
